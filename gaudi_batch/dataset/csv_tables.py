"""CSV and TSV files, of which a broken line costs no other."""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator
from typing import TypeAlias

from gaudi_batch.dataset.lines import Line, Lines, checked, has_surrogates
from gaudi_batch.errors import InputError
from gaudi_batch.text import one_line

MAX_FIELD = 1 << 24
"""Characters of a field of a CSV file."""
MAX_RECORD_LINES = 10_000
"""Lines over which a quoted field of a CSV file goes on; a quote that is not closed before is a mistake."""
Record: TypeAlias = tuple[int, list[str], str | None]
"""The number of the first line, the fields, and why it can't be read."""


class CsvTable(Lines):
    """A CSV file with a header. A column has numbers or truth values if all of its values are, as they are usually
    written; 007 and +49 are texts."""

    delimiter = ","

    def columns(self) -> list[str]:
        """See `PromptTable`. Raises InputError if the header can't be read."""
        header = next(self._records(), None)
        if header is None:
            raise InputError(f"{self.name!r} is empty; its first line must name the columns")
        number, names, error = header
        if error is None and any(map(has_surrogates, names)):
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
                yield checked(number, {name: _typed(value) for name, value in zip(columns, values, strict=True)})

    def _record(self, number: int, text: str, error: str) -> Record:
        """The first line of a record that is broken."""
        return number, [], error

    def _records(self) -> Iterator[Record]:
        """The records, each with the number of its first line, and why it can't be read. Of a record that is broken
        the first line is left out, and the lines after it are read anew: a quote that is not closed would take them
        all."""
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
