"""The table by which loaders of image folders know what each image shows."""

from __future__ import annotations

from collections.abc import Iterable
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
"""Loaders take a column or a field nested in one for names of files, too, if its name with a `_` before it ends so."""


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
            described: a row for each. A column, or a field in one, that a loader would take for its own is renamed.
        """
        rows = loadable(described)
        fields = _renamed_fields(renamed(rows.schema, [FILE_NAME, IMAGE]))
        rows = pa.table([_viewed(*each) for each in zip(rows.columns, fields, strict=True)], pa.schema(fields))
        rows = rows.add_column(0, pa.field(FILE_NAME, pa.string()), names)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, rows.schema, compression="zstd")
        schema = self._writer.schema
        values = [cast(*each) for each in zip(rows.columns, schema.types, strict=True)]
        if len(rows):  # loaders refuse a row group without rows
            self._writer.write_table(pa.table(values, schema=schema))

    def close(self) -> bool:
        """Ends the file; returns whether there is one."""
        if self._writer is not None:
            self._writer.close()
        return self._writer is not None


def _renamed_fields(fields: Iterable[pa.Field]) -> list[pa.Field]:
    """Fields with names that a loader does not take for files."""
    fields = list(fields)
    taken = {field.name for field in fields}
    for place, field in enumerate(fields):
        name = field.name
        if _is_of_files(name):
            while name in taken:
                name = f"{name}_text" if _is_of_files(name) else f"{name}_"
            taken.add(name)
        fields[place] = field.with_name(name).with_type(_renamed_type(field.type))
    return fields


def _is_of_files(name: str) -> bool:
    return f"_{name}".endswith(_OF_FILES)


def _renamed_type(kind: pa.DataType) -> pa.DataType:
    """The same of the fields in a type."""
    if pa.types.is_struct(kind):
        return pa.struct(_renamed_fields(kind))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(*_renamed_fields([kind.value_field]), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(*_renamed_fields([kind.value_field]))
    if pa.types.is_list(kind):
        return pa.list_(*_renamed_fields([kind.value_field]))
    return kind


def _viewed(column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """The same values in a type whose names differ."""
    if column.type == field.type:
        return column
    return pa.chunked_array([chunk.view(field.type) for chunk in column.chunks], field.type)
