"""Which rows of a manifest an export has, and in which split each is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.errors import InputError
from gaudi_batch.text import did_you_mean, one_line

REST = "train"
"""The split of what no share takes."""
_FILTER = re.compile(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_COMPARE = {"<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}
_SHARE = re.compile(r"\s*(\w+)\s*=\s*(\d+(?:\.\d+)?)\s*%\s*")
_SPLIT_NAME = re.compile(r"\w{1,64}", re.ASCII)
MAX_SPLITS = 100


def select(rows: pa.Table, filters: Sequence[str]) -> pa.Table:
    """The rows that pass all filters; those without an image are left out unless a filter names `status`.

    Args:
        rows: of a manifest.
        filters: each `COLUMN=VALUE`, with `!=`, `<`, `<=`, `>` or `>=` in place of `=`. `=` and `!=` take several
            values with commas between them, and `null`; `!=` keeps rows without a value.

    Raises:
        InputError: a filter can't be read, or names a column that is not there.
    """
    names = []
    for text in filters:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise InputError(f"--filter {text!r}: must be COLUMN=VALUE, or with !=, <, <=, > or >= in place of =")
        column, sign, value = match.groups()
        if column not in rows.column_names:
            raise InputError(
                f"--filter {text!r}: the manifest has no column {column!r}; {did_you_mean(column, rows.column_names)}it"
                f" has {one_line(', '.join(rows.column_names), 400)}"
            )
        if pa.types.is_nested(rows.column(column).type):
            raise InputError(f"--filter {text!r}: {column!r} is a column of lists or structs, which have no order")
        names.append(column)
        rows = rows.filter(_mask(rows.column(column), sign, value, text))
    return rows if "status" in names else rows.filter(pc.equal(rows.column("status"), "ok"))


def _mask(column: pa.ChunkedArray, sign: str, value: str, text: str) -> pa.ChunkedArray:
    if sign in _COMPARE:
        return _COMPARE[sign](column, _scalar(value, column.type, text))
    values = [part.strip() for part in value.split(",")]
    given = pa.array([_scalar(part, column.type, text).as_py() for part in values if part != "null"], column.type)
    mask = pc.is_in(column, given)
    if "null" in values:
        mask = pc.or_(mask, pc.is_null(column))
    return pc.invert(mask) if sign == "!=" else mask


def _scalar(value: str, kind: pa.DataType, text: str) -> pa.Scalar:
    try:
        return pa.scalar(value).cast(kind)
    except (pa.ArrowException, ValueError):
        raise InputError(f"--filter {text!r}: {value!r} is no value of a column of type {one_line(kind, 80)}") from None


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
        self._shares: list[tuple[str, float]] = []
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
            if match[1].casefold() in {name.casefold() for name, _ in self._shares}:
                raise InputError(f"--split {text!r}: {match[1]!r} is there twice")
            total += float(match[2])
            self._shares.append((match[1], float(match[2]) / 100))
        if total > 100 + 1e-9:
            raise InputError(f"--split {text!r}: the shares are {total:g} % together; they must be at most 100 %")
        for name, _ in self._shares:
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
            values = rows.column(self._column).to_pylist()
            names = {value: _split_name(value, self._column) for value in set(values)}
            if len(names) > MAX_SPLITS:
                raise InputError(
                    f"--split {self._column!r}: it has {len(names)} values; at most {MAX_SPLITS} can be splits"
                )
            if len({name.casefold() for name in names.values()}) < len(set(names.values())):
                raise InputError(f"--split {self._column!r}: it has values that differ in case alone")
            return [names[value] for value in values]
        if not self._shares:
            return [REST] * len(rows)
        ids = rows.column("id").to_pylist()
        of_id = {identity: self._of_share(identity) for identity in set(ids)}
        return [of_id[identity] for identity in ids]

    def _of_share(self, identity: str) -> str:
        place = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64
        for name, share in self._shares:
            if place < share:
                return name
            place -= share
        return self._shares[-1][0] if sum(share for _, share in self._shares) > 1 - 1e-9 else REST


def _split_name(value: Any, column: str) -> str:
    name = REST if value is None else str(value)
    _require_split(name, column)
    return name


def _require_split(name: str, text: str) -> None:
    """Raises InputError if a text can't be the name of a split: `all` has a meaning of its own in `datasets`, and
    `assets` has the card's pictures."""
    if not _SPLIT_NAME.fullmatch(name) or name.casefold() in ("all", "assets"):
        raise InputError(
            f"--split {text!r}: {name!r:.80} can't be the name of a split, which has 1 to 64 letters, digits and _ of"
            " ASCII alone, and is neither 'all' nor 'assets'"
        )
