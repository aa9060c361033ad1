"""Tables that prompts come as, by the names of their files: CSV, TSV, JSON lines, text, and Parquet."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.dataset.arrow import python_rows
from gaudi_batch.dataset.columns import cast, plain
from gaudi_batch.dataset.csv_tables import CsvTable, TsvTable
from gaudi_batch.dataset.lines import (
    CHUNK_LINES,
    DECOMPRESSION_ERRORS,
    Chunk,
    JsonLines,
    PromptTable,
    Text,
    checked,
    json_table,
)
from gaudi_batch.errors import InputError
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

KINDS = {
    "csv": "csv",
    "tsv": "tsv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "txt": "txt",
    "parquet": "parquet",
}
"""What a file is, by its suffix."""
OPENERS: Mapping[str, Callable[[IO[bytes]], Any]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
"""What opens a compressed file, by its suffix."""
_SUFFIX = re.compile(rf"\.({'|'.join(KINDS)})(\.({'|'.join(OPENERS)}))?$", re.IGNORECASE)


def how_to_convert(
    place: str, names: Iterable[str], columns: Mapping[str, str], has_options: bool = False
) -> str | None:
    """The command that converts the first of some files that is a table, as a part of a sentence; None if none is.

    Args:
        place: the directory in which they lie, or the file itself, or a glob of such files.
        names: of the files in that directory.
        columns: as the job has them.
        has_options: whether the job has options for the storage of the files.
    """
    if glob := re.search(r"[*?\[{]", place):
        place = place[: glob.start()].rpartition("/")[0]
    for name in sorted(names):
        match = _SUFFIX.search(name)
        if match and KINDS[match[1].lower()] != "parquet":
            target = name[: match.start()].rpartition("/")[2] + ".parquet"
            path = place if f"/{place}".endswith(f"/{name}") else f"{place}/{name}"
            renamed = ",".join(f"{name}={column}" for name, column in columns.items())
            flags = ["--columns", renamed] if renamed else []
            command = shlex.join(["gaudi-batch", "prompts", path, target, *flags])
            return (
                f"a job reads Parquet alone, which `{command}` makes of it"
                + (" (with --prompts-storage-options as the job has them)" if has_options else "")
                + (", for the job without its `columns`" if renamed else "")
            )
    return None


def open_table(storage: Storage, path: str, kind: str | None = None) -> PromptTable:
    """A table in a file.

    Args:
        storage: where the file lies.
        path: of the file there.
        kind: of KINDS' values; None takes the suffix.

    Raises:
        InputError: the kind is not known.
        StorageError: storage failed.
    """
    match = _SUFFIX.search(path)
    if kind is None and not match:
        raise InputError(
            f"{path!r}: the name ends with none of {', '.join(f'.{suffix}' for suffix in KINDS)} (also with"
            f" {', '.join(f'.{suffix}' for suffix in OPENERS)} after it); --format says what it is"
        )
    if kind is None:
        assert match is not None
        kind = KINDS[match[1].lower()]
    compression = path.rpartition(".")[2].lower()

    def opened() -> IO[bytes]:
        file = io.BufferedReader(storage.open(path), 1 << 20)
        return OPENERS[compression](file) if compression in OPENERS else file

    tables: dict[str, Callable[[str, Callable[[], IO[bytes]]], PromptTable]]
    tables = {
        "csv": CsvTable,
        "tsv": TsvTable,
        "jsonl": JsonLines,
        "json": json_table,
        "txt": Text,
        "parquet": ParquetTable,
    }
    return tables[kind](path, opened)


class ParquetTable:
    """A Parquet file."""

    unit = "row"

    def __init__(self, name: str, opened: Callable[[], IO[bytes]]) -> None:
        self.name = name
        self._opened = opened
        try:
            with pq.ParquetFile(opened()) as file:
                self._schema = plain(file.schema_arrow)
        except (pa.ArrowException, ValueError, *DECOMPRESSION_ERRORS) as error:
            raise InputError(f"{name!r} is not a readable Parquet file: {one_line(error, 300)}") from None

    def columns(self) -> list[str]:
        """See `PromptTable`."""
        return list(self._schema.names)

    def chunks(self, known: Collection[str]) -> Iterator[Chunk]:
        """See `PromptTable`. Raises InputError if the file can't be read to its end."""
        number = 0
        try:
            with pq.ParquetFile(self._opened()) as file:
                for batch in file.iter_batches(CHUNK_LINES):
                    table = pa.Table.from_batches([batch])
                    looked_at = [name for name in table.column_names if name in known]
                    rows = python_rows(table.select(looked_at))
                    lines = [checked(number + place, values) for place, values in enumerate(rows, 1)]
                    number += len(lines)
                    rest = table.drop_columns(looked_at)
                    columns = [cast(*each) for each in zip(rest.columns, plain(rest.schema).types, strict=True)]
                    yield Chunk(lines, pa.table(columns, names=rest.column_names))
        except (pa.ArrowException, *DECOMPRESSION_ERRORS) as error:
            raise InputError(f"{self.name!r} can't be read after row {number}: {one_line(error, 300)}") from None

    def type_of(self, column: str) -> pa.DataType | None:
        """See `PromptTable`."""
        return self._schema.field(column).type if column in self._schema.names else None
