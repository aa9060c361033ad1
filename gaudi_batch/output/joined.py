"""manifest.parquet: all manifests of a run as one file, in order of row as far as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gaudi_batch.dataset.columns import cast, plain
from gaudi_batch.errors import StorageError
from gaudi_batch.output import manifest
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.storage.scratch import scratch_directory
from gaudi_batch.text import one_line

SORTED_BYTES = 512 << 20
"""Manifests are sorted in memory up to this size, about two million images; sorting takes as much again."""
GROUP_BYTES = 64 << 20
"""Size in memory of the manifests that make one row group."""
_ORDER = [("row", "ascending"), ("image_index", "ascending")]


class JoinedManifest:
    """Writes the file: in order of row and image if its rows take at most SORTED_BYTES in memory, else in order of
    shards."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._buffered: list[pa.Table] = []
        self._bytes = 0

    def __enter__(self) -> JoinedManifest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and self._schema is not None:
                self._end()
        finally:
            if self._writer is not None:
                self._writer.close()

    def add(self, table: pa.Table) -> None:
        """Adds the rows of one manifest. Those of a run that older code began may have other types than the first."""
        if self._schema is None:
            self._schema = plain(table.schema.remove_metadata())
        columns = [cast(*each) for each in zip(table.columns, self._schema.types, strict=True)]
        table = pa.table(columns, schema=self._schema)
        self._buffered.append(table)
        self._bytes += table.nbytes
        if self._bytes >= (SORTED_BYTES if self._writer is None else GROUP_BYTES):
            self._write_waiting()

    def _end(self) -> None:
        if self._writer is None and self._buffered:
            whole = pa.concat_tables(self._buffered)
            self._buffered.clear()
            order = pc.sort_indices(whole.select([name for name, _ in _ORDER]), _ORDER)
            if not np.array_equal(order.to_numpy(), np.arange(len(whole))):
                whole = whole.take(order)
            self._buffered.append(whole)
        self._write_waiting()

    def _write_waiting(self) -> None:
        if not self._buffered:
            return
        self._writer = self._writer or pq.ParquetWriter(self._path, self._schema, compression="zstd")
        whole = pa.concat_tables(self._buffered)
        self._writer.write_table(whole, row_group_size=max(1, len(whole) * GROUP_BYTES // max(1, self._bytes)))
        self._buffered.clear()
        self._bytes = 0


def join_manifests(
    ledger: Ledger,
    latest_shard_of_row: Mapping[int, int],
    committed: Mapping[int, str],
    seen: Callable[[pa.Table], None] = lambda table: None,
) -> tuple[int, int]:
    """Writes manifest.parquet, all manifests as one, and makes sure that it can be read.

    Args:
        ledger: of the run.
        latest_shard_of_row: rows of several shards, with the highest of these, which alone counts.
        committed: the attempt of each committed shard.
        seen: called with the rows of each manifest that count.

    Returns:
        Its images and its failed rows.

    Raises:
        StorageError: the manifests that are there now are others, or what was written is not what is there.
    """
    with scratch_directory("join the manifests") as directory:
        path = Path(directory) / "manifest.parquet"
        try:
            rows, failed = _join_into(path, ledger, latest_shard_of_row, committed, seen)
            if not committed:
                return 0, 0
            manifest.require_readable(path, rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StorageError(
                f"can't join the manifests in {directory}: {one_line(error)}; those in manifest/ are as they were"
            ) from None
        ledger.put_file("manifest.parquet", path)
        written, stored = path.stat().st_size, ledger.storage.info("manifest.parquet")["size"]
    if stored != written:
        raise StorageError(f"{ledger.storage.url}: manifest.parquet has {stored} bytes, and {written} were written")
    return rows - failed, failed


def _join_into(
    path: Path,
    ledger: Ledger,
    latest_shard_of_row: Mapping[int, int],
    committed: Mapping[int, str],
    seen: Callable[[pa.Table], None],
) -> tuple[int, int]:
    joined: dict[int, str] = {}
    rows = failed = 0
    with JoinedManifest(path) as file:
        for info, table in ledger.commits():
            joined[info.shard] = info.attempt
            if latest_shard_of_row:
                counts = [latest_shard_of_row.get(row, 0) <= info.shard for row in table.column("row").to_pylist()]
                table = table.filter(pa.array(counts, pa.bool_()))
            seen(table)
            file.add(table)
            rows += len(table)
            failed += pc.sum(pc.equal(table.column("status"), "failed")).as_py() or 0
        if joined != committed:
            changed = min(shard for shard, _ in joined.items() ^ committed.items())
            raise StorageError(f"{ledger.storage.url}: the manifest of shard {changed} is not what it just was")
    return rows, failed
