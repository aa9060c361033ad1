"""Which rows of a manifest an export has, and in which split each is."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.dataset.arrow import is_text, python_rows
from gaudi_batch.dataset.lines import number_of
from gaudi_batch.errors import InputError
from gaudi_batch.export.names import is_device
from gaudi_batch.text import did_you_mean, one_line

log = logging.getLogger(__name__)

REST = "train"
"""The split of what no share takes."""
_FILTER = re.compile(r"\s*([^=!<>]+?)\s*([=!<>]+)\s*(.*?)\s*", re.DOTALL)
_COMPARE = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}
_SIGNS = ("=", "==", "!=", *_COMPARE)
_VALUE = re.compile(r'\s*(?:"((?:[^"]|"")*)"|((?!")[^,]*?))\s*(,|\Z)', re.DOTALL)
"""A value of a filter, and the comma after it."""
_EXACT = pa.decimal256(76, 38)
"""Exact numbers of any column, and those that they are compared with."""
_MAX_EXPONENT = 100
"""Of the power of ten of a number in a filter: no column has others, and pyarrow reads some of them out of bounds."""
_SHARE = re.compile(r"\s*(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*%\s*")
_SPLIT_NAME = re.compile(r"\w{1,64}", re.ASCII)
MAX_SPLITS = 100


def select(rows: pa.Table, filters: Sequence[str]) -> pa.Table:
    """The rows that pass all filters; those without an image are left out unless a filter names `status`.

    Args:
        rows: of a manifest.
        filters: each `COLUMN=VALUE`, with `!=`, `<`, `<=`, `>` or `>=` in place of `=`, which may be `==`, too. `=`
            and `!=` take several values with commas between them, and `null`; `!=` keeps rows without a value. A value
            with a comma, or that begins with one of these signs, stands in double quotes, as in CSV. A time without a
            zone is UTC where the column has a zone.

    Raises:
        InputError: a filter can't be read, or names a column that is not there.
    """
    for text in filters:
        column, sign, value = _parsed(text)
        if column not in rows.column_names:
            raise InputError(
                f"--filter {text!r}: the manifest has no column {column!r}; {did_you_mean(column, rows.column_names)}it"
                f" has {one_line(', '.join(rows.column_names), 400)}"
            )
        if pa.types.is_nested(rows.column(column).type):
            raise InputError(f"--filter {text!r}: {column!r} is a column of lists or structs, which have no order")
        try:
            mask = _mask(rows.column(column), sign, value, text)
        except pa.ArrowNotImplementedError:
            kind = one_line(rows.column(column).type, 80)
            raise InputError(
                f"--filter {text!r}: {column!r} is a column of type {kind}, which can't be compared"
            ) from None
        rows = rows.filter(mask)
    return rows if takes_failed(filters) else rows.filter(pc.equal(rows.column("status"), "ok"))


def takes_failed(filters: Sequence[str]) -> bool:
    """Whether rows without an image may pass. Raises InputError if a filter can't be read."""
    return any(_parsed(text).column == "status" for text in filters)


class _Filter(NamedTuple):
    column: str
    sign: str
    value: str


def _parsed(text: str) -> _Filter:
    match = _FILTER.fullmatch(text)
    if match is None:
        raise InputError(f"--filter {text!r}: must be COLUMN=VALUE, or with !=, <, <=, > or >= in place of =")
    parsed = _Filter(*match.groups())
    if parsed.sign not in _SIGNS:
        raise InputError(
            f"--filter {text!r}: {parsed.sign!r} compares nothing; it must be {', '.join(_SIGNS[:-1])} or {_SIGNS[-1]},"
            " and a value that begins with one of = ! < > stands in double quotes"
        )
    return parsed


def _mask(column: pa.ChunkedArray, sign: str, value: str, text: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    parts = _parts(value, text)
    values = [part.value for part in parts]
    if sign in _COMPARE:
        if len(values) != 1 or values[0] is None:
            raise InputError(
                f"--filter {text!r}: {sign} takes one value; one with a comma in it stands in double quotes"
            )
        if is_text(column.type) and _number(values[0]) is not None:
            log.warning("--filter %r compares texts letter by letter: '10' comes before '9'", text)
        column, (bound,) = _comparable(column, [values[0]], text)
        return _COMPARE[sign](column, bound)
    is_several = len(parts) > 1 and not all(part.is_quoted for part in parts)
    if is_several and is_text(column.type) and pc.any(pc.equal(column, value)).as_py():
        quoted = '"{}"'.format(value.replace('"', '""'))
        raise InputError(
            f"--filter {text!r}: {value!r} is several values, and one value of the column; as {quoted} it is one, and"
            " with each of them in double quotes it is several"
        )
    column, scalars = _comparable(column, [each for each in values if each is not None], text)
    # Of scalars and not of Python's values, which have no nanoseconds.
    given = [pa.array([each], column.type) for each in scalars]
    mask = pc.is_in(column, pa.concat_arrays(given) if given else pa.array([], column.type))
    if None in values:
        mask = pc.or_(mask, pc.is_null(column))
    return pc.invert(mask) if sign == "!=" else mask


class _Part(NamedTuple):
    """A value of a filter."""

    value: str | None
    """None is null."""
    is_quoted: bool


def _parts(value: str, text: str) -> list[_Part]:
    """The values with commas between them, each as CSV has it."""
    parts: list[_Part] = []
    place, separator = 0, ","
    while separator:
        match = _VALUE.match(value, place)
        if match is None:
            raise InputError(
                f"--filter {text!r}: a value that begins with a double quote must end with one, and has two for each"
                " that is in it"
            )
        quoted, bare, separator = match.groups()
        if quoted is not None:
            parts.append(_Part(quoted.replace('""', '"'), True))
        else:
            parts.append(_Part(None if bare == "null" else bare, False))
        place = match.end()
    return parts


def _comparable(column: pa.ChunkedArray, values: Sequence[str], text: str) -> tuple[pa.ChunkedArray, list[pa.Scalar]]:
    """A column and values in one type: its own, or a wider one where it has exact numbers, and a value has more digits
    than they. Raises InputError."""
    kind = column.type
    scalars = [_cast(value, kind) for value in values]
    if None in scalars and _is_exact(kind):
        numbers = [
            _number(value) if scalar is None else scalar.cast(_EXACT)
            for value, scalar in zip(values, scalars, strict=True)
        ]
        if None not in numbers:
            return column.cast(_EXACT), numbers
        scalars = numbers
    if None in scalars:
        value = values[scalars.index(None)]
        example = "; a time is as 2026-11-29 or 2026-11-29T14:30:00" if pa.types.is_timestamp(kind) else ""
        told = f"{value!r} is no value of a column of type {one_line(kind, 80)}{example}"
        raise InputError(f"--filter {text!r}: {told}")
    return column, scalars


def _cast(value: str, kind: pa.DataType) -> pa.Scalar | None:
    """A value in a type; None if it has none there."""
    if pa.types.is_decimal(kind) and _is_out_of_bounds(value):
        return None
    kinds = [kind]
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        kinds.append(pa.timestamp(kind.unit))  # a time without a zone, which the second cast takes as UTC
    for given in kinds:
        with contextlib.suppress(pa.ArrowInvalid, ValueError):
            return pa.scalar(value).cast(given).cast(kind)
    return None


def _is_exact(kind: pa.DataType) -> bool:
    """Whether values of a type are exact numbers, all of which `_EXACT` has, too."""
    if pa.types.is_decimal(kind):
        return max(kind.scale, kind.precision - kind.scale) <= _EXACT.scale  # type: ignore[no-any-return]
    return bool(pa.types.is_integer(kind))


def _number(value: str) -> pa.Scalar | None:
    """A number as an exact one; None if it is none."""
    with contextlib.suppress(pa.ArrowInvalid, ValueError, ArithmeticError):
        return None if _is_out_of_bounds(value) else pa.scalar(number_of(value), _EXACT)
    return None


def _is_out_of_bounds(value: str) -> bool:
    try:
        return abs(number_of(value).adjusted()) > _MAX_EXPONENT
    except (ValueError, ArithmeticError):
        return False


class Splits:
    """How rows are split.

    Args:
        text: None for one split; shares as `test=5%,validation=5%`, by a hash of each row's id; or a column, whose
            values are the splits.
        columns: of the manifest.

    Raises:
        InputError: it is neither shares of at most 100 % nor a column.
    """

    def __init__(self, text: str | None, columns: Sequence[str]) -> None:
        self._column: str | None = None
        self.shares: list[tuple[str, float]] = []
        """Names with shares, 0 to 1; what none of them takes is in `REST`."""
        if text is None:
            return
        if "=" not in text:
            if text not in columns:
                raise InputError(
                    f"--split {text!r}: must be shares, as test=5%, or a column; {did_you_mean(text, columns)}columns"
                    f" are {one_line(', '.join(columns), 400)}"
                )
            self._column = text
            return
        total = 0.0
        for part in text.split(","):
            match = _SHARE.fullmatch(part)
            if match is None or not 0 < float(match[2]) <= 100:
                raise InputError(f"--split {text!r}: {part.strip()!r} is no share; it must be as test=5%")
            _require_split(match[1], text)
            if match[1].casefold() in {name.casefold() for name, _ in self.shares}:
                raise InputError(f"--split {text!r}: {match[1]!r} is there twice")
            total += float(match[2])
            self.shares.append((match[1], float(match[2]) / 100))
        if total > 100 + 1e-9:
            raise InputError(f"--split {text!r}: the shares are {total:g} % together; they must be at most 100 %")
        for name, _ in self.shares:
            if name != REST and name.casefold() == REST:
                raise InputError(f"--split {text!r}: {name!r} differs from {REST!r}, which has the rest, in case alone")

    def of(self, rows: pa.Table) -> list[str]:
        """The split of each row. All rows of one id are in one split, whatever else is exported.

        Raises:
            InputError: a value of the column can't be the name of a split.
        """
        if self._column is not None:
            if pa.types.is_nested(rows.column(self._column).type):
                raise InputError(f"--split {self._column!r}: is a column of lists or structs, which name no split")
            values = [row[self._column] for row in python_rows(rows.select([self._column]))]
            names = {value: _split_name(value, self._column) for value in set(values)}
            if len(names) > MAX_SPLITS:
                raise InputError(
                    f"--split {self._column!r}: it has {len(names)} values; at most {MAX_SPLITS} can be splits"
                )
            if len({name.casefold() for name in names.values()}) < len(set(names.values())):
                raise InputError(f"--split {self._column!r}: it has values that differ in case alone")
            return [names[value] for value in values]
        if not self.shares:
            return [REST] * len(rows)
        ids = rows.column("id").to_pylist()
        of_id = {identity: self._of_share(identity) for identity in set(ids)}
        return [of_id[identity] for identity in ids]

    def _of_share(self, identity: str) -> str:
        place = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64
        for name, share in self.shares:
            if place < share:
                return name
            place -= share
        return REST if self.has_rest else self.shares[-1][0]

    @property
    def has_rest(self) -> bool:
        """Whether the shares leave something over."""
        return sum(share for _, share in self.shares) <= 1 - 1e-9


def _split_name(value: Any, column: str) -> str:
    name = REST if value is None else str(value)
    _require_split(name, column)
    return name


def _require_split(name: str, text: str) -> None:
    """Raises InputError if a text can't be the name of a split: `all` has a meaning of its own in `datasets`, `assets`
    has the card's pictures, and Windows makes no directory with the name of a device."""
    if not _SPLIT_NAME.fullmatch(name) or name.casefold() in ("all", "assets") or is_device(name):
        raise InputError(
            f"--split {text!r}: {name!r:.80} can't be the name of a split, which has 1 to 64 letters, digits and _ of"
            " ASCII alone, and is neither 'all' nor 'assets' nor a device of Windows, as 'con' or 'aux'"
        )
