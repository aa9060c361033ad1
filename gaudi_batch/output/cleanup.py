"""Removes files from an output: those of attempts that were not committed, and a whole run for a new one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gaudi_batch.layout import (
    DATA,
    IMAGES,
    JOINED,
    LOG,
    METADATA,
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


def remove_superseded(ledger: Ledger, latest_shard_of_row: Mapping[int, int], shards: Iterable[int]) -> None:
    """Removes images of rows that were made again, so that whoever opens all images meets none twice.

    Args:
        ledger: of the run.
        latest_shard_of_row: rows of several shards, with the highest of these, which alone counts.
        shards: the committed ones that may hold such rows.

    Raises:
        LeaseLost: another driver has taken over.
        StorageError: storage failed.
    """
    if not latest_shard_of_row:
        return
    paths: dict[str, bool] = {}  # whether none of its images counts
    for info, table in ledger.read_commits(shards):
        for row, path in zip(table.column("row").to_pylist(), table.column("path").to_pylist(), strict=True):
            if path is not None:
                is_old = latest_shard_of_row.get(row, info.shard) > info.shard
                paths[path] = paths.get(path, True) and is_old
    superseded = [path for path, is_old in paths.items() if is_old]
    stored = {place: set(ledger.storage.names(place)) for place in {path.rpartition("/")[0] for path in superseded}}
    with ThreadPoolExecutor(REMOVE_THREADS) as pool:
        _remove_all(
            pool, ledger, [path for path in superseded if path.rpartition("/")[2] in stored[path.rpartition("/")[0]]]
        )


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


def remove_parts(ledger: Ledger, driver: str = "") -> None:
    """Removes what processes that were killed have left on a disk of files that they were writing, beside images in
    directories, which go with their attempt, and the small files that others than this thread may be writing now.

    Args:
        ledger: of the run.
        driver: the one whose log another thread may be writing.

    Raises:
        LeaseLost: another driver has taken over.
        StorageError: storage failed.
    """
    storage = ledger.storage
    cards = [f"throughput/{card}" for card in storage.names("throughput")] if storage.local else []
    for place in ("", "manifest", ROLLUPS, TIMELINE, LOG, JOINED, IMAGES, DATA, *cards):
        for name, wanted in storage.unfinished(place).items():
            own_log = place == LOG and wanted.startswith(f"{driver}-")
            if wanted not in WRITTEN_BY_OTHERS and not own_log and is_of_run(f"{place}/{wanted}".lstrip("/")):
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
        for place in (ROLLUPS, TIMELINE, LOG):
            names = own_names(place, ledger.storage.names(place))
            _remove_all(pool, ledger, [f"{place}/{name}" for name in names])
    for name in (f"{IMAGES}/{METADATA}", *OWN_FILES):
        ledger.remove(name)


def _remove_all(pool: ThreadPoolExecutor, ledger: Ledger, paths: Iterable[str]) -> None:
    for _ in pool.map(ledger.remove, paths):
        pass


def left_by_attempts(storage: Storage) -> Iterator[Left]:
    """The objects and directories named after attempts."""
    for place in (IMAGES, DATA, *(f"throughput/{card}" for card in storage.names("throughput"))):
        for name in storage.names(place):
            if parsed := parse_attempt(name):
                yield Left(f"{place}/{name}", *parsed)
