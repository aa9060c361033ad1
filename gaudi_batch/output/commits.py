"""The committed shards of a run, as its driver knows them: each manifest is read once, and rolled up as the run goes.

Resuming reads the roll-ups and what came after them. The rows of manifests that no roll-up has are kept in memory until
they are enough for one; a small run never has any.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.errors import StorageError
from gaudi_batch.garbage import no_collections
from gaudi_batch.layout import ROLLUPS, manifest_path, own_names
from gaudi_batch.output import manifest, rollup
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.reader import READ_THREADS
from gaudi_batch.output.rollup import Commit
from gaudi_batch.storage.listing import Entry, md5_of
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

ROLLUP_SHARDS = 4096
"""Shards of a roll-up at most: so many manifests are read one by one where a driver was killed."""
ROLLUP_BYTES = 64 << 20
"""Size in memory of a roll-up's rows, at which it is written whatever its shards are."""
HELD_SHARDS, HELD_BYTES = 4 * ROLLUP_SHARDS, 4 * ROLLUP_BYTES
"""Manifests whose rows are kept in memory at most, where roll-ups are written slowly or not at all."""


@dataclass
class _Held:
    """A manifest whose rows no roll-up has."""

    table: pa.Table | None  # None where memory is short; it is then read again
    md5: str | None  # of its bytes; None if it was read from storage, and its entry is known

    @property
    def nbytes(self) -> int:
        return 0 if self.table is None else int(self.table.nbytes)


@dataclass
class Part:
    """A roll-up of which something counts."""

    name: str
    shards: set[int]
    """Those that count."""
    rows_bytes: int
    """Size in memory of all its rows."""
    whole: bool = True
    """Whether all of its shards count."""


class Commits:
    """See the module. The threads that commit may call `add`, and one more thread `tables`; all else is one thread's.

    Args:
        ledger: of the run.
        driver: its driver, by which roll-ups are named.
    """

    def __init__(self, ledger: Ledger, driver: str) -> None:
        self.ledger = ledger
        self.by_shard: dict[int, Commit] = {}
        """The commits that count, in no order."""
        self.retired: set[int] = set()
        """Shards whose manifest says that they are retired, while the plan does not say so yet."""
        self.parts: list[Part] = []
        self.added: Callable[[], None] = lambda: None
        """Called after each `add`."""
        self._driver = driver
        self._held: dict[int, _Held] = {}
        self._held_bytes = 0
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(1, "roll up")
        self._under_way: Future[None] | None = None
        self._looked = False
        self._written = 0

    @property
    def rows_bytes(self) -> int:
        """Size in memory of all rows."""
        return self._held_bytes + sum(part.rows_bytes for part in self.parts)

    def in_order(self) -> Iterator[Commit]:
        """The commits in order of their shards."""
        return (self.by_shard[shard] for shard in sorted(self.by_shard))

    def attempt_of(self, shard: int) -> str | None:
        """The attempt that is committed of a shard; None if none is known to be."""
        commit = self.by_shard.get(shard)
        return None if commit is None else commit.info.attempt

    @no_collections()
    def refresh(self, listed: Mapping[int, Entry] | None = None) -> None:
        """Brings all in line with what storage lists: what is gone is forgotten, and what is new or another is read.

        Args:
            listed: the manifests, if they have just been listed.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed for longer than `storage_patience`.
        """
        self._wait()
        if listed is None:
            listed = self.ledger.manifest_entries()
        with self._lock:
            if not self._looked:
                self._read_rollups(listed)
                self._looked = True
            for shard, commit in list(self.by_shard.items()):
                entry = listed.get(shard)
                known = commit.entry
                if known is None and entry is not None and _holds(entry, self._held[shard].md5):
                    self.by_shard[shard] = replace(commit, entry=entry)
                elif known is None or entry != known:
                    self._forget(shard)
        unknown = [shard for shard in sorted(listed) if shard not in self.by_shard and shard not in self.retired]
        for info, table in self.ledger.read_commits(unknown):
            if info.retired:
                self.retired.add(info.shard)
            else:
                self._take(info, table, listed[info.shard], None)

    def add(self, info: CommitInfo, data: bytes) -> pa.Table | None:
        """Takes in a manifest that this driver has put; returns its failed rows, if there are any.

        Args:
            info: of the commit.
            data: the manifest.
        """
        table, _ = manifest.read(data)
        failed = self._take(info, table, None, hashlib.md5(data, usedforsecurity=False).hexdigest())
        self.added()
        return failed

    def tables(self, latest_shard_of_row: Mapping[int, int]) -> Iterator[pa.Table]:
        """The rows that count, roll-up by roll-up, and those that no roll-up has in order of their shards.

        Args:
            latest_shard_of_row: rows of several shards, with the highest of these, which alone counts.

        Raises:
            StorageError: storage failed, or a roll-up is not what it was.
        """
        self._wait()
        with self._lock:
            parts = [replace(part, shards=set(part.shards)) for part in self.parts]
            held = dict(self._held)
        for part in parts:
            yield rollup.keep_latest(self.rows_of(part, self.bytes_of(part)), latest_shard_of_row)
        for table in self._held_tables(sorted(held), held):
            yield rollup.keep_latest(table, latest_shard_of_row)

    def rows_of(self, part: Part, data: bytes) -> pa.Table:
        """The rows of a roll-up that count, from its object. Raises StorageError if these are not as many as the
        manifests have."""
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        if not part.whole:
            table = rollup.keep_shards(table, part.shards)
        infos = [self.by_shard[shard].info for shard in part.shards]
        expected = sum(info.images + info.failed_rows for info in infos)
        if len(table) != expected:
            raise StorageError(
                f"{self.ledger.storage.url}/{rollup.rows_path(part.name)} has {len(table)} rows, and the manifests"
                f" {expected}; remove the directory {ROLLUPS} of the output, and the same command reads all manifests"
            )
        return table

    def bytes_of(self, part: Part) -> bytes:
        """The object of a roll-up's rows. Raises StorageError."""
        data = self.ledger.storage.get(rollup.rows_path(part.name))
        if data is None:
            raise StorageError(
                f"{self.ledger.storage.url}/{rollup.rows_path(part.name)} is not there any more; remove the directory"
                f" {ROLLUPS} of the output, and the same command reads all manifests"
            )
        return data

    def roll_up_rest(self) -> None:
        """Writes roll-ups of all that has none yet. Raises LeaseLost or StorageError."""
        self._wait()
        while self._held:
            self._roll_up()

    def remove_unused(self, drivers: Collection[str]) -> None:
        """Removes the roll-ups that say nothing of the run: a driver that was killed has left rows without an index, or
        others have taken their place.

        Args:
            drivers: those of the run; what others have named is not the run's.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed.
        """
        self._wait()
        used = {path for part in self.parts for path in (rollup.rows_path(part.name), rollup.index_path(part.name))}
        for name in own_names(ROLLUPS, self.ledger.storage.names(ROLLUPS)):
            if f"{ROLLUPS}/{name}" not in used and name.startswith(tuple(drivers)):
                self.ledger.remove(f"{ROLLUPS}/{name}")

    # -- inside -------------------------------------------------------------------------------------------------

    def _take(self, info: CommitInfo, table: pa.Table, entry: Entry | None, md5: str | None) -> pa.Table | None:
        finished = manifest.finished_at(table, info)
        if finished != info.finished_at:
            info = replace(info, finished_at=finished)
        with self._lock:
            if info.shard in self.by_shard:
                self._forget(info.shard)
            failed = rollup.failed_rows_of(table) if info.failed_rows else None
            self.by_shard[info.shard] = Commit(info, entry, failed)
            is_short = len(self._held) >= HELD_SHARDS or self._held_bytes >= HELD_BYTES
            held = self._held[info.shard] = _Held(None if is_short else table, md5)
            self._held_bytes += held.nbytes
            is_enough = len(self._held) >= ROLLUP_SHARDS or self._held_bytes >= ROLLUP_BYTES
            if is_enough and (self._under_way is None or self._under_way.done()):
                self._under_way = self._pool.submit(self._roll_up_early)
        return failed

    def _forget(self, shard: int) -> None:
        del self.by_shard[shard]
        held = self._held.pop(shard, None)
        if held is not None:
            self._held_bytes -= held.nbytes
        for part in self.parts:
            if shard in part.shards:
                part.shards.discard(shard)
                part.whole = False
        self.parts = [part for part in self.parts if part.shards]

    def _read_rollups(self, listed: Mapping[int, Entry]) -> None:
        unknown = {shard: entry for shard, entry in listed.items() if shard not in self.by_shard}
        for index in rollup.read_indexes(self.ledger.storage, unknown, self.ledger.is_of_run):
            self.by_shard |= index.commits
            self.parts.append(Part(index.name, set(index.commits), index.rows_bytes, index.whole))

    def _roll_up_early(self) -> None:
        try:
            self._roll_up()
        except (StorageError, pa.ArrowException, ValueError) as error:
            # The manifests are there, and the next one tries again.
            log.warning("the manifests of the last shards are not rolled up: %s", one_line(error, 300))

    def _roll_up(self) -> None:
        """Writes a roll-up of what is held, up to ROLLUP_SHARDS."""
        with self._lock:
            held = dict(sorted(self._held.items())[:ROLLUP_SHARDS])
        with ThreadPoolExecutor(READ_THREADS) as pool:
            entries = list(pool.map(self._entry_of, held, held.values()))
        stored = {shard: entry for shard, entry in zip(held, entries, strict=True) if entry is not None}
        with self._lock:
            for shard in held.keys() - stored.keys():
                self._forget(shard)  # another manifest is there, which `refresh` reads
            commits = [replace(self.by_shard[shard], entry=entry) for shard, entry in stored.items()]
        if not commits:
            return
        table = rollup.join_tables(list(self._held_tables(stored, held)))
        self._written += 1
        name = f"{self._driver}{self._written:06d}"
        self.ledger.put(rollup.rows_path(name), rollup.encode_rows(table))
        self.ledger.put(rollup.index_path(name), rollup.encode_index(commits, table.nbytes))
        with self._lock:
            self.parts.append(Part(name, set(stored), table.nbytes))
            for commit in commits:
                self.by_shard[commit.info.shard] = commit
                self._held_bytes -= self._held.pop(commit.info.shard).nbytes

    def _entry_of(self, shard: int, held: _Held) -> Entry | None:
        """The manifest in the listing; None if it is not the one that is held."""
        known = self.by_shard[shard].entry
        if known is not None:
            return known
        storage, path = self.ledger.storage, manifest_path(shard)
        entry = storage.entry(path)
        if entry is None or _holds(entry, held.md5):
            return entry
        data = storage.get(path)
        is_same = data is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() == held.md5
        return entry if is_same and storage.entry(path) == entry else None

    def _held_tables(self, shards: Iterable[int], held: Mapping[int, _Held]) -> Iterator[pa.Table]:
        """The rows of manifests that no roll-up has. Raises StorageError if one that is read again has changed."""
        shards = list(shards)
        read = self.ledger.read_commits([shard for shard in shards if held[shard].table is None])
        for shard in shards:
            table = held[shard].table
            if table is None:
                info, table = next(read, (None, None))
                if info is None or (info.shard, info.attempt) != (shard, self.by_shard[shard].info.attempt):
                    raise StorageError(
                        f"{self.ledger.storage.url}: the manifest of shard {shard} is not what it just was"
                    )
            yield table

    def _wait(self) -> None:
        if self._under_way is not None:
            self._under_way.result()


def _holds(entry: Entry, md5: str | None) -> bool:
    """Whether an object's mark shows that it has these bytes."""
    return md5 is not None and md5_of(entry.mark) == md5
