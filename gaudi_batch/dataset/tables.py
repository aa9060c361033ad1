"""Tables that are no Parquet datasets, read line by line: CSV, TSV, JSON lines, text, and one Parquet file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import shlex
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.dataset.arrow import python_rows
from gaudi_batch.dataset.columns import cast, plain
from gaudi_batch.dataset.rows import Undecodable
from gaudi_batch.errors import InputError
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

KINDS = {"csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "txt": "txt", "parquet": "parquet"}
"""What a file is, by its suffix."""
OPENERS: Mapping[str, Callable[[IO[bytes]], Any]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}
"""What opens a compressed file, by its suffix."""
_SUFFIX = re.compile(rf"\.({'|'.join(KINDS)})(\.({'|'.join(OPENERS)}))?$", re.IGNORECASE)
CHUNK_LINES = 1024
MAX_FIELD = 1 << 24
"""Characters of a field of a CSV file."""
MAX_RECORD_LINES = 10_000
"""Lines over which a quoted field of a CSV file goes on; a quote that is not closed before is a mistake."""


Record: TypeAlias = tuple[int, list[str], str | None]
"""The number of the first line, the fields, and why it can't be read."""


class BadLine(Exception):
    """A line that is not what a job takes."""


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    number: int
    """Counted from 1, with the header."""
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Why it can't be read; None if it can."""


class Chunk(NamedTuple):
    """Some lines of a table."""

    lines: list[Line]
    rest: pa.Table | None = None
    """The columns that are not looked at, where these have types; else they stand in the lines."""


class PromptTable(Protocol):
    """A table that can be read more than once."""

    name: str
    unit: str
    """What its lines are called."""

    def columns(self) -> list[str]:
        """The names of its columns. Raises InputError."""

    def chunks(self, known: Collection[str]) -> Iterator[Chunk]:
        """Its lines in order, without the header, some at a time.

        Args:
            known: the columns whose values are looked at.
        """

    def type_of(self, column: str) -> pa.DataType | None:
        """The type of a column; None where it follows from the values."""


def how_to_convert(place: str, names: Iterable[str]) -> str | None:
    """The command that converts the first of some files that is a table, as a part of a sentence; None if none is.

    Args:
        place: the directory in which they lie, or the file itself, or a glob of such files.
        names: of the files in that directory.
    """
    if glob := re.search(r"[*?\[{]", place):
        place = place[: glob.start()].rpartition("/")[0]
    for name in sorted(names):
        match = _SUFFIX.search(name)
        if match and KINDS[match[1].lower()] != "parquet":
            target = name[: match.start()].rpartition("/")[2] + ".parquet"
            path = place if f"/{place}".endswith(f"/{name}") else f"{place}/{name}"
            command = shlex.join(["gaudi-batch", "prompts", path, target])
            return f"a job reads Parquet alone, which `{command}` makes of it"
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
    tables = {"csv": CsvTable, "tsv": TsvTable, "jsonl": JsonLines, "txt": Text, "parquet": ParquetTable}
    return tables[kind](path, opened)


class _Lines:
    """A table in lines of text."""

    unit = "line"

    def __init__(self, name: str, opened: Callable[[], IO[bytes]]) -> None:
        self.name = name
        self._opened = opened

    def type_of(self, column: str) -> pa.DataType | None:
        """Follows from the values."""
        return None

    def chunks(self, known: Collection[str]) -> Iterator[Chunk]:
        """See `PromptTable`."""
        lines = self.lines()
        while chunk := list(itertools.islice(lines, CHUNK_LINES)):
            yield Chunk(chunk)

    def lines(self) -> Iterator[Line]:
        """The lines in order."""
        raise NotImplementedError

    def _texts(self) -> Iterator[tuple[int, str]]:
        """The lines and their numbers; bytes that are not UTF-8 become surrogates."""
        with self._opened() as file:
            try:
                for number, line in enumerate(file, 1):
                    text = line.decode("utf-8", "surrogateescape")
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise InputError(f"{self.name!r} can't be decompressed: {one_line(error)}") from None


class Text(_Lines):
    """A text file with a prompt a line; empty lines are no prompts."""

    def columns(self) -> list[str]:
        """See `PromptTable`."""
        return ["prompt"]

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`."""
        for number, text in self._texts():
            if text.strip():
                yield _checked(number, {"prompt": text.rstrip("\r\n")})


class JsonLines(_Lines):
    """A file with a JSON object a line."""

    def columns(self) -> list[str]:
        """See `PromptTable`; all columns of all lines."""
        return list(dict.fromkeys(name for line in self.lines() for name in line.values))

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`."""
        for number, text in self._texts():
            if not text.strip():
                continue
            if _has_surrogates(text):
                yield _checked(number, {"": text})
                continue
            try:
                values = json.loads(text)
                if not isinstance(values, dict):
                    raise ValueError("it is no JSON object")
            except (ValueError, RecursionError) as error:
                yield Line(number, error=f"not JSON: {one_line(error)}")
            else:
                yield _checked(number, values)


class CsvTable(_Lines):
    """A CSV file with a header. A column has numbers or truth values if all of its values are, as they are usually
    written; 007 and +49 are texts."""

    delimiter = ","

    def columns(self) -> list[str]:
        """See `PromptTable`. Raises InputError if the header can't be read."""
        header = next(self._records(), None)
        if header is None:
            raise InputError(f"{self.name!r} is empty; its first line must name the columns")
        number, names, error = header
        if error is None and any(map(_has_surrogates, names)):
            error = "not UTF-8"
        if error is not None:
            raise InputError(f"{self.name!r}: the header in line {number} can't be read: {error}")
        return names

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`."""
        columns = self.columns()
        for number, values, error in itertools.islice(self._records(), 1, None):
            if error is not None:
                yield Line(number, error=error)
            elif not values:
                continue
            elif len(values) != len(columns):
                yield Line(number, error=f"it has {len(values)} fields, and the header {len(columns)}")
            else:
                yield _checked(number, {name: _typed(value) for name, value in zip(columns, values, strict=True)})

    def _record(self, number: int, text: str, error: str) -> Record:
        """The first line of a record that is broken."""
        return number, [], error

    def _records(self) -> Iterator[Record]:
        """The records, each with the number of its first line, and why it can't be read. Of a record that is broken
        the first line is left out, and the lines after it are read anew: a quote that is not closed would take them
        all."""
        source = self._texts()
        again: deque[tuple[int, str]] = deque()
        taken: list[tuple[int, str]] = []

        def texts() -> Iterator[str]:
            while True:
                line = again.popleft() if again else next(source, None)
                if line is None:
                    return
                taken.append(line)
                if len(taken) > MAX_RECORD_LINES:
                    raise csv.Error("a quote is not closed")
                yield line[1]

        csv.field_size_limit(MAX_FIELD)
        while True:
            reader = csv.reader(texts(), delimiter=self.delimiter, strict=True)
            try:
                for values in reader:
                    yield taken[0][0], values, None
                    taken.clear()
                return
            except csv.Error as error:
                is_open = len(taken) > 1 or "unexpected end" in str(error)
                why = "a quote is not closed" if is_open else f"not CSV: {one_line(error)}"
                yield self._record(*taken[0], why)
                again.extendleft(reversed(taken[1:]))
                taken.clear()


class TsvTable(CsvTable):
    """The same with tabs in place of commas. Many such files quote nothing, and so quotes that do not go together are a
    part of the text."""

    delimiter = "\t"

    def _record(self, number: int, text: str, error: str) -> Record:
        return number, text.rstrip("\r\n").split(self.delimiter), None


class ParquetTable:
    """A Parquet file."""

    unit = "row"

    def __init__(self, name: str, opened: Callable[[], IO[bytes]]) -> None:
        self.name = name
        self._opened = opened
        try:
            with pq.ParquetFile(opened()) as file:
                self._schema = plain(file.schema_arrow)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{name!r} is not a readable Parquet file: {one_line(error, 300)}") from None

    def columns(self) -> list[str]:
        """See `PromptTable`."""
        return list(self._schema.names)

    def chunks(self, known: Collection[str]) -> Iterator[Chunk]:
        """See `PromptTable`. Raises InputError if the file can't be read to its end."""
        number = 0
        with pq.ParquetFile(self._opened()) as file:
            try:
                for batch in file.iter_batches(CHUNK_LINES):
                    table = pa.Table.from_batches([batch])
                    looked_at = [name for name in table.column_names if name in known]
                    rows = python_rows(table.select(looked_at))
                    lines = [_checked(number + place, values) for place, values in enumerate(rows, 1)]
                    number += len(lines)
                    rest = table.drop_columns(looked_at)
                    columns = [cast(*each) for each in zip(rest.columns, plain(rest.schema).types, strict=True)]
                    yield Chunk(lines, pa.table(columns, names=rest.column_names))
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{self.name!r} can't be read after row {number}: {one_line(error, 300)}") from None

    def type_of(self, column: str) -> pa.DataType | None:
        """See `PromptTable`."""
        return self._schema.field(column).type if column in self._schema.names else None


_WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})\.\d{1,17}([eE][+-]?\d{1,2})?", re.ASCII)
_TRUTH = {"true": True, "false": False, "True": True, "False": False}


class TypedText(str):
    """A text that may be a number or a truth value, if all others of its column may."""

    value: int | float | bool


def _typed(text: str) -> str | None:
    """A field of a CSV file; None if it is empty."""
    value: int | float | bool | None = _TRUTH.get(text)
    if _WHOLE_NUMBER.fullmatch(text):
        value = int(text)
    elif _NUMBER.fullmatch(text):
        value = float(text)
    if value is None:
        return text or None
    typed = TypedText(text)
    typed.value = value
    return typed


def _checked(number: int, values: Mapping[str, Any]) -> Line:
    """A line, unless it has bytes that are not UTF-8."""
    for name, value in values.items():
        if _has_surrogates(name):
            return Line(number, error="the name of a field is not UTF-8")
        if isinstance(value, Undecodable) or (isinstance(value, str) and _has_surrogates(value)):
            return Line(number, error=f"{name or 'it'} is not UTF-8")
    return Line(number, values)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
