"""The table by which loaders of image folders know what each image shows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.dataset.columns import cast
from gaudi_batch.output.formats.loadable import loadable
from gaudi_batch.output.manifest import renamed

FILE_NAME = "file_name"
"""The column with the name of an image, relative to the table."""
IMAGE = "image"
"""What loaders call the column of images, which they add."""
_OF_FILES = ("_file_name", "_file_names")
"""Loaders take columns whose names end so for files, too."""


class ImageFolder:
    """Writes the table.

    Args:
        path: of the local file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def add(self, names: pa.ChunkedArray, described: pa.Table) -> None:
        """Adds images.

        Args:
            names: of their files, relative to the table.
            described: a row for each. A column that a loader would take for its own is renamed.
        """
        rows = loadable(described)
        rows = rows.rename_columns(_column_names(renamed(rows.schema, [FILE_NAME, IMAGE]).names))
        rows = rows.add_column(0, pa.field(FILE_NAME, pa.string()), names)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, rows.schema, compression="zstd")
        schema = self._writer.schema
        values = [cast(*each) for each in zip(rows.columns, schema.types, strict=True)]
        self._writer.write_table(pa.table(values, schema=schema))

    def close(self) -> bool:
        """Ends the file; returns whether there is one."""
        if self._writer is not None:
            self._writer.close()
        return self._writer is not None


def _column_names(names: list[str]) -> list[str]:
    """Names of columns that a loader does not take for files."""
    taken = set(names)
    for place, name in enumerate(names):
        if name.endswith(_OF_FILES):
            while name in taken:
                name = f"{name}_text" if name.endswith(_OF_FILES) else f"{name}_"
            taken.add(name)
            names[place] = name
    return names
