"""CSV and TSV files, of which a broken line costs no other."""

from __future__ import annotations

import contextlib
import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gaudi_batch.dataset.lines import Line, Lines, checked, has_surrogates, number_of
from gaudi_batch.errors import InputError
from gaudi_batch.text import counted, one_line

MAX_FIELD = 1 << 24
"""Characters of a field of a CSV file."""
MAX_RECORD_LINES = 10_000
"""Lines over which a quoted field of a CSV file goes on; a quote that is not closed before is a mistake."""


class Record(NamedTuple):
    """A row of fields."""

    number: int
    """Of its first line."""
    values: list[str]
    error: str | None = None
    """Why it can't be read; None if it can."""
    span: int = 1
    """Over how many lines it goes."""


class _NotClosed(csv.Error):
    """A record of which a quote is taken for one that is not closed; the message says why."""


class CsvTable(Lines):
    """A CSV file with a header; spaces around its names do not count. A column has numbers or truth values if all of
    its values are, as they are usually written; 007 and +49 are texts."""

    def columns(self) -> list[str]:
        """See `PromptTable`. Raises InputError if the header can't be read."""
        header = next(self._records(), None)
        if header is None:
            raise InputError(f"{self.name!r} is empty; its first line must name the columns")
        if not header.values and header.error is None:
            raise InputError(f"{self.name!r}: line 1 is empty; it must name the columns")
        error = "not UTF-8; save the file as UTF-8" if any(map(has_surrogates, header.values)) else header.error
        if error is not None:
            raise InputError(f"{self.name!r}: the header in line {header.number} can't be read: {error}")
        return [name.strip() for name in header.values]

    def lines(self) -> Iterator[Line]:
        """See `PromptTable`."""
        columns = self.columns()
        for number, values, error, span in itertools.islice(self._records(), 1, None):
            if error is None and values and len(values) != len(columns):
                error = f"it has {counted(len(values), 'field')}, and the header {len(columns)}"
                if span > 1:
                    error += "; a quote may not be closed"
            if error is not None:
                yield Line(number, error=error, span=span)
            elif values:
                fields = {name: _typed(value) for name, value in zip(columns, values, strict=True)}
                yield checked(number, fields, span)

    def _records(self) -> Iterator[Record]:
        """The records. Of one whose quote is not closed the first line is left out, and the lines after it are read
        anew: it would take them all."""
        source = self.texts()
        again: deque[tuple[int, str]] = deque()
        taken: list[tuple[int, str]] = []

        def texts() -> Iterator[str]:
            while True:
                line = again.popleft() if again else next(source, None)
                if line is None:
                    return
                taken.append(line)
                if len(taken) > MAX_RECORD_LINES:
                    raise _NotClosed(_OPEN)
                yield line[1]

        csv.field_size_limit(MAX_FIELD)
        width, has_spaces = 0, False  # of the header
        while True:
            try:
                for values in csv.reader(texts(), strict=True):
                    if len(taken) > 1 and _are_rows([text for _, text in taken], width, has_spaces):
                        first, last = taken[0][0], taken[-1][0]
                        raise _NotClosed(
                            f"lines {first} to {last} are taken for rows of their own, as each has all fields, and a"
                            f" number or nothing in the same column; close the quote in line {first}, or give a row"
                            " over several lines as JSON"
                        )
                    yield Record(taken[0][0], values, span=len(taken))
                    if not width:
                        width, has_spaces = len(values), any(name[:1].isspace() for name in values)
                    taken.clear()
                return
            except csv.Error as error:
                yield Record(taken[0][0], [], _reason(error, len(taken)))
                again.extendleft(reversed(taken[1:]))
                taken.clear()


_OPEN = "a quote is not closed"


def _reason(error: csv.Error, lines: int) -> str:
    """Why a record of so many lines can't be read."""
    if isinstance(error, _NotClosed):
        return str(error)
    return _OPEN if lines > 1 or "unexpected end" in str(error) else f"not CSV: {one_line(error)}"


def _are_rows(lines: Sequence[str], width: int, has_spaces: bool) -> bool:
    """Whether each of the lines of a record is a row of its own, which only a quote that is not closed has made a part
    of another: it has all fields, and one column has numbers. A text over several lines rarely has. Where the file has
    no spaces after its commas, as a text has, a number with one is a part of a text."""
    rows = [line.rstrip("\r\n").split(",") for line in lines]
    if any(len(row) != width for row in rows):
        return False
    if has_spaces:
        rows = [[value.strip() for value in row] for row in rows]
    return any(_has_numbers(column, 0 < place < width - 1) for place, column in enumerate(zip(*rows, strict=True)))


def _has_numbers(column: Sequence[str], is_within: bool) -> bool:
    """Whether a column has numbers and nothing else, where it is not empty. In the first or the last column one number
    is not enough: a text whose lines all end with commas has one after its end."""
    values = [value for value in column if value]
    return len(values) > (0 if is_within else 1) and all(map(_is_number, values))


def _is_number(text: str) -> bool:
    try:
        return text == text.strip() and number_of(text).is_finite()
    except (ValueError, ArithmeticError):
        return False


class TsvTable(CsvTable):
    """The same with tabs in place of commas, and a line is always a row. Many such files quote nothing: quotes are
    taken off where they enclose a field as in CSV, and otherwise are a part of the text."""

    def _records(self) -> Iterator[Record]:
        csv.field_size_limit(MAX_FIELD)
        width = 0
        for number, text in self.texts():
            line = text.rstrip("\r\n")
            values = line.split("\t") if line else []
            if '"' in line:
                with contextlib.suppress(csv.Error):
                    unquoted = next(csv.reader([line], delimiter="\t", strict=True))
                    values = unquoted if len(unquoted) == (width or len(unquoted)) else values
            yield Record(number, values)
            width = width or len(values)


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
