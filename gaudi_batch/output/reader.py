"""The records of a run, for code that only reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from gaudi_batch.errors import InputError
from gaudi_batch.garbage import no_collections
from gaudi_batch.layout import manifest_path, parse_manifest
from gaudi_batch.output import manifest
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.plan_file import decode_plan
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.plan import Shard
from gaudi_batch.storage.listing import Entry
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

READ_THREADS = 16


class OutputReader:
    """The records in one output.

    Args:
        storage: the output.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._info: RunInfo | None = None  # manifests of any run count until run.json has been read
        self._retired: list[Shard] = []  # known once the plan has been read

    def run(self) -> RunInfo | None:
        """The run of this output, or None.

        Raises:
            InputError: run.json is there and can't be read.
        """
        data = self.storage.get("run.json")
        if data is None:
            return None
        try:
            self._info = RunInfo.parse(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self.storage.url}/run.json can't be read ({one_line(error)}); --overwrite starts this output afresh"
            ) from None
        return self._info

    def holds_run(self) -> bool:
        """Whether there is a run here, or a rest of one."""
        return self.storage.get("run.json") is not None or bool(self.manifests())

    def plan(self, rows: int) -> list[Shard]:
        """The shards of a run of so many rows, see `decode_plan`.

        Raises:
            InputError: it is missing or can't be read.
        """
        data = self.storage.get("plan.parquet")
        try:
            if data is None:
                raise ValueError("it is not there")
            shards, self._retired = decode_plan(data, rows)
            return shards
        except ValueError as error:
            raise InputError(
                f"{self.storage.url}/plan.parquet can't be read ({one_line(error)}); --overwrite starts this output"
                " afresh"
            ) from None

    def manifests(self) -> list[int]:
        """Numbers of the shards that have a manifest, from their names alone; also of those that are retired."""
        numbers = (parse_manifest(name) for name in self.storage.names("manifest"))
        return sorted(number for number in numbers if number is not None)

    @no_collections()
    def manifest_entries(self) -> dict[int, Entry]:
        """The manifests in the listing by their shards, without those of shards that the plan says are retired."""
        retired = {shard.number for shard in self._retired}
        entries = ((parse_manifest(name), entry) for name, entry in self.storage.entries("manifest").items())
        return {number: entry for number, entry in entries if number is not None and number not in retired}

    def committed_shards(self) -> list[int]:
        """The same without those that the plan, if it has been read, says are retired."""
        retired = {shard.number for shard in self._retired}
        return [number for number in self.manifests() if number not in retired]

    def commits(self) -> Iterator[tuple[CommitInfo, pa.Table]]:
        """Every whole manifest, in order of its shard. One that was written in part is passed over, and so is one that
        says of its shard that it is retired."""
        for info, table in self.all_commits():
            if not info.retired:
                yield info, table

    def all_commits(self) -> Iterator[tuple[CommitInfo, pa.Table]]:
        """The same with those of shards that are retired and that the plan does not call so yet."""
        return self.read_commits(self.committed_shards())

    def read_commits(self, shards: Iterable[int]) -> Iterator[tuple[CommitInfo, pa.Table]]:
        """The whole manifests of some shards, in their order."""
        pool = ThreadPoolExecutor(READ_THREADS)
        try:
            for commit in _ahead(pool, self.read_commit, shards):
                if commit is not None:
                    yield commit
        finally:
            # If one could not be read, the others would take as long to fail.
            pool.shutdown(wait=False, cancel_futures=True)

    def read_commit(self, shard: int) -> tuple[CommitInfo, pa.Table] | None:
        """The manifest of a shard; None where there is none that is whole and of this run."""
        data = self.storage.get(manifest_path(shard))
        if data is None:
            return None
        try:
            table, info = manifest.read(data)
        except ValueError:
            return None
        return (info, table) if info.shard == shard and self.is_of_run(info) else None

    def is_of_run(self, info: CommitInfo) -> bool:
        """Whether a manifest is one of this run."""
        return self._info is None or info.run == self._info.run_id

    @property
    def stack(self) -> Mapping[str, str] | None:
        """The stack that made the run's last images; None where no card has been asked."""
        stacks = self._info.stacks if self._info is not None else None
        return stacks[-1] or None if stacks else None

    def get_json(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON object; None if there is none that is whole."""
        data = self.storage.get(name)
        try:
            loaded = json.loads(data) if data is not None else None
        except (ValueError, RecursionError):
            return None
        return loaded if isinstance(loaded, dict) else None


def _ahead(pool: ThreadPoolExecutor, function: Callable[[int], Any], items: Iterable[int]) -> Iterator[Any]:
    """Maps in order with a bounded number of pending results, so that memory does not grow with the run."""
    pending = []
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= 4 * READ_THREADS:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()
