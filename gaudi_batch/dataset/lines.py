"""Tables that are read line by line: what a line is, and the tables of JSON lines and of text."""

from __future__ import annotations

import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol

import pyarrow as pa

from gaudi_batch.dataset.rows import Undecodable
from gaudi_batch.errors import InputError
from gaudi_batch.text import one_line

CHUNK_LINES = 1024


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
        """The lines and their numbers; bytes that are not UTF-8 become surrogates."""
        with self._opened() as file:
            try:
                for number, line in enumerate(file, 1):
                    text = line.decode("utf-8", "surrogateescape")
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise InputError(f"{self.name!r} can't be decompressed: {one_line(error)}") from None


class Text(Lines):
    """A text file with a prompt a line; empty lines are no prompts."""

    def columns(self) -> list[str]:
        """See `PromptTable`."""
        return ["prompt"]

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`."""
        for number, text in self.texts():
            if text.strip():
                yield checked(number, {"prompt": text.rstrip("\r\n")})


class JsonLines(Lines):
    """A file with a JSON object a line."""

    def columns(self) -> list[str]:
        """See `PromptTable`; all columns of all lines."""
        return list(dict.fromkeys(name for line in self.lines() for name in line.values))

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
                if not isinstance(values, dict):
                    raise ValueError("it is no JSON object")
            except (ValueError, RecursionError) as error:
                yield Line(number, error=f"not JSON: {one_line(error)}")
            else:
                yield checked(number, values)


class Json(JsonLines):
    """A file with a JSON array of objects, which is read whole; or with an object a line."""

    unit = "item"

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`. Raises InputError if it is neither."""
        with self._opened() as file:
            start = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
        if not start.startswith(b"["):
            yield from super().lines()
            return
        text = "".join(text for _, text in self.texts())
        try:
            items = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.name!r} is no JSON: {one_line(error)}") from None
        for number, item in enumerate(items, 1):
            if isinstance(item, dict):
                yield checked(number, item)
            else:
                yield Line(number, error="it is no JSON object")


def checked(number: int, values: Mapping[str, Any]) -> Line:
    """A line, unless it has bytes that are not UTF-8."""
    for name, value in values.items():
        if has_surrogates(name):
            return Line(number, error="the name of a field is not UTF-8")
        if isinstance(value, Undecodable) or (isinstance(value, str) and has_surrogates(value)):
            return Line(number, error=f"{name or 'it'} is not UTF-8")
    return Line(number, values)


def has_surrogates(text: str) -> bool:
    """Whether a text has bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
