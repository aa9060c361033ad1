"""Removes files from an output: those of attempts that were not committed, and a whole run for a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from gaudi_batch.layout import OWN_FILES, ROLLUPS, TIMELINE, manifest_path, own_names, parse_attempt
from gaudi_batch.output.ledger import Ledger

REMOVE_THREADS = 16


def remove_orphans(ledger: Ledger, committed: Mapping[int, str], may_remove: Callable[[str], bool]) -> int:
    """Removes the files of attempts that were not committed; returns how many objects or directories that were.

    Args:
        ledger: of the run.
        committed: the attempt of each committed shard.
        may_remove: tells of an attempt whether it is this driver's, or that of one that is over.
    """
    removed = 0
    for path, shard, attempt in _left_by_attempts(ledger):
        if committed.get(shard) != attempt and may_remove(attempt):
            ledger.remove(path)
            removed += 1
    return removed


def clear(ledger: Ledger) -> None:
    """Removes a run from its output, and nothing else that lies there.

    Commits go first and run.json last, so that a crash in between leaves a run that makes its images again.
    """
    if not ledger.holds_run():
        return
    with ThreadPoolExecutor(REMOVE_THREADS) as pool:
        _remove_all(pool, ledger, map(manifest_path, ledger.manifests()))
        _remove_all(pool, ledger, (path for path, _, _ in list(_left_by_attempts(ledger))))
        for place in (ROLLUPS, TIMELINE):
            names = own_names(place, ledger.storage.names(place))
            _remove_all(pool, ledger, [f"{place}/{name}" for name in names])
    for name in OWN_FILES:
        ledger.remove(name)


def _remove_all(pool: ThreadPoolExecutor, ledger: Ledger, paths: Iterable[str]) -> None:
    for _ in pool.map(ledger.remove, paths):
        pass


def _left_by_attempts(ledger: Ledger) -> Iterator[tuple[str, int, str]]:
    """The objects and directories named after attempts, each with its shard and its attempt."""
    storage = ledger.storage
    for place in ("images", *(f"throughput/{card}" for card in storage.names("throughput"))):
        for name in storage.names(place):
            if parsed := parse_attempt(name):
                yield f"{place}/{name}", *parsed
