"""Removes files from an output: those of attempts that were not committed, and a whole run for a new one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gaudi_batch.layout import (
    JOINED,
    OWN_FILES,
    ROLLUPS,
    STOP_FILE,
    TIMELINE,
    is_of_run,
    manifest_path,
    own_names,
    parse_attempt,
)
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.storage.store import Storage

REMOVE_THREADS = 16
WRITTEN_BY_OTHERS = ("lease.json", STOP_FILE)
"""Files that the thread which keeps the lease, or another command, may be writing."""


class Left(NamedTuple):
    """An object or a directory that an attempt has left."""

    path: str
    shard: int
    attempt: str


def remove_left(ledger: Ledger, left: Iterable[Left], committed: Mapping[int, str]) -> None:
    """Removes what attempts have left that were not committed; what is not there is no error.

    Args:
        ledger: of the run.
        left: what they have left.
        committed: the attempt of each committed shard.

    Raises:
        LeaseLost: another driver has taken over.
        StorageError: storage failed.
    """
    with ThreadPoolExecutor(REMOVE_THREADS) as pool:
        _remove_all(pool, ledger, [each.path for each in left if committed.get(each.shard) != each.attempt])


def remove_parts(ledger: Ledger) -> None:
    """Removes what processes that were killed have left on a disk of files that they were writing, beside images, which
    go with their attempt, and the small files that others than this thread may be writing now. Raises LeaseLost or
    StorageError."""
    storage = ledger.storage
    cards = [f"throughput/{card}" for card in storage.names("throughput")] if storage.local else []
    for place in ("", "manifest", ROLLUPS, TIMELINE, JOINED, *cards):
        for name, wanted in storage.unfinished(place).items():
            if wanted not in WRITTEN_BY_OTHERS and is_of_run(f"{place}/{wanted}".lstrip("/")):
                ledger.remove(f"{place}/{name}".lstrip("/"))


def clear(ledger: Ledger) -> None:
    """Removes a run from its output, and nothing else that lies there.

    Commits go first and run.json last, so that a crash in between leaves a run that makes its images again.
    """
    if not ledger.holds_run():
        return
    with ThreadPoolExecutor(REMOVE_THREADS) as pool:
        _remove_all(pool, ledger, map(manifest_path, ledger.manifests()))
        _remove_all(pool, ledger, [left.path for left in left_by_attempts(ledger.storage)])
        for place in (ROLLUPS, TIMELINE):
            names = own_names(place, ledger.storage.names(place))
            _remove_all(pool, ledger, [f"{place}/{name}" for name in names])
    for name in OWN_FILES:
        ledger.remove(name)


def _remove_all(pool: ThreadPoolExecutor, ledger: Ledger, paths: Iterable[str]) -> None:
    for _ in pool.map(ledger.remove, paths):
        pass


def left_by_attempts(storage: Storage) -> Iterator[Left]:
    """The objects and directories named after attempts."""
    for place in ("images", *(f"throughput/{card}" for card in storage.names("throughput"))):
        for name in storage.names(place):
            if parsed := parse_attempt(name):
                yield Left(f"{place}/{name}", *parsed)
