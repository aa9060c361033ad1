"""Which rows of a dataset can't be run, and why: read a record batch at a time, before any card is.

A row is judged by `make_row`, as a card judges it. That is too slow for all rows of a large dataset, so Arrow finds the
few that may be bad first: what it passes over, `make_row` would pass, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.config.bounds import MAX_SEED
from gaudi_batch.dataset.arrow import distinct_rows, is_text, rows_at
from gaudi_batch.dataset.columns import plain
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.dataset.reasons import Reasons
from gaudi_batch.dataset.repeats import RepeatedIds
from gaudi_batch.dataset.rows import SHAPE_COLUMNS, RowRules, make_row
from gaudi_batch.dataset.scan import batches
from gaudi_batch.errors import InputError

Mask = npt.NDArray[np.bool_]

FIRST_ROWS = 5
VISIBLE = r"[\pL\pN]"
"""A text with a letter or a digit is not empty. `make_row` judges the others."""
LONG_TEXT = 4096
"""Characters; `make_row` judges longer texts, too."""


@dataclass(frozen=True)
class Survey:
    """The result of reading all rows."""

    rows: int
    """Rows that were read."""
    bad: int
    """Rows that can't be run."""
    reasons: list[dict[str, Any]]
    """The bad rows by reason, as `Reasons.describe` has them."""
    first: list[tuple[int, str]]
    """Number and error of the first bad row."""
    repeated: str | None
    """The line about ids that repeat."""

    @property
    def examples(self) -> str:
        """The first rows that can't be run, each with its number and error."""
        more = f" and {self.bad - len(self.first)} more" if self.bad > len(self.first) else ""
        return "; ".join(f"row {row}: {error}" for row, error in self.first) + more

    @property
    def refusal(self) -> str:
        """The reason of `--strict` to refuse the job; None if there is none."""
        return f"--strict: {self.bad} rows can't be run: {self.examples}"


def survey(dataset: PromptDataset, rules: RowRules, limit: int | None, every_column: bool = False) -> Survey:
    """Reads all rows and finds those that can't be run.

    Args:
        dataset: the rows.
        rules: what a row may ask for.
        limit: how many rows the job is about; None for all.
        every_column: whether carried columns are read, too: what can't be decoded fails the rows of its row group.

    Raises:
        InputError: a file can't be read any more.
        StorageError: the store failed for longer than `storage_patience`.
    """
    rows = bad = 0
    reasons, first, repeated = Reasons(), list[tuple[int, str]](), RepeatedIds()

    def add(number: int, row_id: str, error: str) -> None:
        nonlocal bad
        bad += 1
        reasons.add(error, row_id)
        if len(first) < FIRST_ROWS:
            first.append((number, error))

    for read in batches(dataset, limit, every_column):
        rows += len(read.rows)
        if read.error is not None:
            for number in read.rows:
                add(number, str(number), read.error)
            continue
        suspect = np.flatnonzero(_suspects(read.table, rules))
        for place, values in zip(suspect.tolist(), rows_at(read.table, suspect), strict=True):
            row = make_row(read.rows[place], values, rules)
            if row.error is not None:
                add(row.row, row.id, row.error)
        if "id" in read.table.column_names:
            repeated.add(_ids_without_seed(read.table))
    return Survey(rows, bad, reasons.describe(), first, repeated.describe())


def _ids_without_seed(table: pa.Table) -> pa.ChunkedArray:
    ids = table.column("id")
    return ids.filter(pc.is_null(table.column("seed"))) if "seed" in table.column_names else ids


def _suspects(table: pa.Table, rules: RowRules) -> Mask:
    """Rows that may be bad; every bad row is among them."""
    suspect = np.zeros(table.num_rows, np.bool_)
    shapes = [name for name in table.column_names if name in SHAPE_COLUMNS]
    if shapes:
        codes, distinct = distinct_rows(table.select(shapes), table.num_rows)
        suspect |= np.array([rules.shape(values)[2] is not None for values in distinct], np.bool_)[codes]
    for name in table.column_names:
        if name not in SHAPE_COLUMNS:
            suspect |= _suspect_values(name, table.column(name))
    if not rules.takes_negative and "negative_prompt" in table.column_names:
        suspect |= _mask(pc.is_valid(table.column("negative_prompt")))
    return suspect


def _suspect_values(name: str, column: pa.ChunkedArray) -> Mask:
    try:
        column = column.cast(plain(pa.schema([(name, column.type)])).field(0).type)
    except pa.ArrowException:
        return np.ones(len(column), np.bool_)
    valid = _mask(pc.is_valid(column))
    if name == "seed":
        return _suspect_seeds(column, valid)
    if not is_text(column.type):
        return valid if name != "id" or not pa.types.is_integer(column.type) else np.zeros(len(column), np.bool_)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:  # a text in it is not UTF-8
        return np.ones(len(column), np.bool_)
    long = _mask(pc.fill_null(pc.greater(pc.utf8_length(column), LONG_TEXT), False))
    if name != "prompt":
        return long
    return long | ~_mask(pc.fill_null(pc.match_substring_regex(column, VISIBLE), False))


def _suspect_seeds(column: pa.ChunkedArray, valid: Mask) -> Mask:
    kind = column.type
    if pa.types.is_floating(kind):
        values = column.to_numpy()
        with np.errstate(invalid="ignore"):
            bad: Mask = valid & ~((values == np.floor(values)) & (values >= 0) & (values < MAX_SEED))
        return bad
    if not pa.types.is_integer(kind):
        return valid
    if pa.types.is_unsigned_integer(kind):
        return _mask(pc.fill_null(pc.greater(column.cast(pa.uint64()), pa.scalar(MAX_SEED, pa.uint64())), False))
    return _mask(pc.fill_null(pc.less(column, pa.scalar(0, kind)), False))


def _mask(column: pa.ChunkedArray) -> Mask:
    return np.asarray(column.to_numpy(), np.bool_)


def refuse_bad_rows(dataset: PromptDataset, rules: RowRules, limit: int | None) -> None:
    """Reads every row and refuses the job if one of them can't be run, as `run --strict` does.

    Raises:
        InputError: with the first few such rows.
    """
    surveyed = survey(dataset, rules, limit, every_column=True)
    if surveyed.bad:
        raise InputError(surveyed.refusal)
