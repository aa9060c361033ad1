"""manifest.parquet: all manifests of a run as one file, in order of row as far as memory allows."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gaudi_batch.dataset.columns import cast, plain

SORTED_BYTES = 512 << 20
"""Of manifests in memory up to which they are sorted, about two million images; sorting takes as much again."""
GROUP_BYTES = 64 << 20
"""Of manifests in memory that make one row group."""
_ORDER = [("row", "ascending"), ("image_index", "ascending")]


class JoinedManifest:
    """Writes the file, in order of row and image where its rows take at most SORTED_BYTES in memory, else as they
    come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._waiting: list[pa.Table] = []
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
        self._waiting.append(table)
        self._bytes += table.nbytes
        if self._bytes >= (SORTED_BYTES if self._writer is None else GROUP_BYTES):
            self._write_waiting()

    def _end(self) -> None:
        if self._writer is None and self._waiting:
            whole = pa.concat_tables(self._waiting)
            self._waiting.clear()
            order = pc.sort_indices(whole.select([name for name, _ in _ORDER]), _ORDER)
            if not np.array_equal(order.to_numpy(), np.arange(len(whole))):
                whole = whole.take(order)
            self._waiting.append(whole)
        self._write_waiting()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        self._writer = self._writer or pq.ParquetWriter(self._path, self._schema, compression="zstd")
        whole = pa.concat_tables(self._waiting)
        self._writer.write_table(whole, row_group_size=max(1, len(whole) * GROUP_BYTES // max(1, self._bytes)))
        self._waiting.clear()
        self._bytes = 0
