"""Tables that are read line by line: what a line is, and the tables of JSON lines and of text."""

from __future__ import annotations

import codecs
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import IO, Any, NamedTuple, Protocol

import pyarrow as pa

from gaudi_batch.dataset.rows import Undecodable
from gaudi_batch.errors import InputError
from gaudi_batch.text import one_line

CHUNK_LINES = 1024
DECOMPRESSION_ERRORS = (EOFError, OSError, lzma.LZMAError, zlib.error)
"""What reading a compressed file raises that is damaged, or is none."""
OTHER_UNICODE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""What files in UTF-16 or UTF-32 begin with."""


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
    span: int = 1
    """Over how many lines of the file it goes."""

    def place(self, unit: str) -> str:
        """Its number in words.

        Args:
            unit: what a line is called.
        """
        if self.span == 1:
            return f"{unit} {self.number}"
        return f"{unit}s {self.number} to {self.number + self.span - 1}"


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


class Lines:
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

    def texts(self) -> Iterator[tuple[int, str]]:
        """The lines and their numbers. A line ends with LF, CR LF or CR, which it keeps; bytes that are not UTF-8
        become surrogates. Raises InputError if the file can't be read to its end."""
        number = 0
        with io.TextIOWrapper(self._opened(), "utf-8", "surrogateescape", newline="") as file:
            try:
                for number, line in enumerate(file, 1):
                    if number == 1 and line.encode("utf-8", "surrogateescape").startswith(OTHER_UNICODE):
                        raise InputError(f"{self.name!r} is text in UTF-16 or UTF-32; save it as UTF-8")
                    yield number, line.removeprefix("\ufeff") if number == 1 else line
            except DECOMPRESSION_ERRORS as error:
                after = f" after line {number}" if number else ""
                raise InputError(
                    f"{self.name!r} can't be decompressed{after}: {one_line(error)}; bring the whole file anew, or"
                    " rename it if it is not compressed as its name says"
                ) from None


class Text(Lines):
    """A text file with a prompt a line; empty lines are no prompts."""

    def columns(self) -> list[str]:
        """See `PromptTable`."""
        return ["prompt"]

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`."""
        for number, text in self.texts():
            if "\0" in text:
                yield Line(number, error="it has a zero character; if the file is UTF-16, save it as UTF-8")
            elif text.strip():
                yield checked(number, {"prompt": text.rstrip("\r\n")})


class JsonLines(Lines):
    """A file with a JSON object a line."""

    def columns(self) -> list[str]:
        """See `PromptTable`; all columns of all lines."""
        return _columns(self.lines())

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`."""
        for number, text in self.texts():
            if not text.strip():
                continue
            if has_surrogates(text):
                yield checked(number, {"": text})
                continue
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Line(number, error=_json_error(error, text))
            else:
                if isinstance(values, dict):
                    yield checked(number, values)
                else:
                    yield Line(number, error=_NO_OBJECT)


class JsonArray(Lines):
    """A file with a JSON array of objects, which is read whole."""

    unit = "item"

    def columns(self) -> list[str]:
        """See `PromptTable`; all columns of all items."""
        return _columns(self.lines())

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`. Raises InputError if it is no JSON."""
        text = "".join(text for _, text in self.texts())
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            why = one_line(error) if isinstance(error, json.JSONDecodeError) else _json_error(error, text)
            raise InputError(f"{self.name!r} can't be read as a JSON array, no item of it: {why}") from None
        for number, item in enumerate(items, 1):
            yield checked(number, item) if isinstance(item, dict) else Line(number, error=_NO_OBJECT)


def json_table(name: str, opened: Callable[[], IO[bytes]]) -> PromptTable:
    """A file with a JSON array of objects, or with an object a line. Raises InputError if it can't be read."""
    table = JsonLines(name, opened)
    first = next((text for _, text in table.texts() if text.strip()), "")
    return JsonArray(name, opened) if first.lstrip().startswith("[") else table


_NO_OBJECT = "it is no JSON object"


def _columns(lines: Iterator[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.values))


def _json_error(error: ValueError | RecursionError, text: str) -> str:
    """Why a text can't be read as JSON."""
    if isinstance(error, RecursionError):
        return "not JSON: it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):  # what int() raises
        return "a number has too many digits; in quotes it is kept as a text"
    if error.pos >= len(text.rstrip()):
        return (
            "not JSON: it ends too early; an object must stand whole in its line, or be one of an array with --format"
            " json"
        )
    return f"not JSON: {error.msg} at column {error.colno}"


def checked(number: int, values: Mapping[str, Any], span: int = 1) -> Line:
    """A line, unless it has bytes that are not UTF-8."""
    for name, value in values.items():
        if has_surrogates(name):
            return Line(number, error="the name of a field is not UTF-8", span=span)
        if isinstance(value, Undecodable) or (isinstance(value, str) and has_surrogates(value)):
            return Line(number, error=f"{name or 'it'} is not UTF-8", span=span)
    return Line(number, values, span=span)


def number_of(text: str) -> Decimal:
    """A number with all its digits, as a field may have it: spaces around it do not count. Raises ValueError or
    ArithmeticError."""
    if not text.isascii() or "_" in text:
        raise ValueError
    return Decimal(text)


def has_surrogates(text: str) -> bool:
    """Whether a text has bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
