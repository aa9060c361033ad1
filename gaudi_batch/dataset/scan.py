"""All rows of a dataset, a record batch at a time: their shapes for the planner, their values for a survey."""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gaudi_batch.dataset.arrow import distinct_rows
from gaudi_batch.dataset.prompt_file import PromptFile
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.dataset.rows import SHAPE_COLUMNS, RowRules
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.plan import GroupRows, RowSpan
from gaudi_batch.text import one_line


class RowGroup(NamedTuple):
    """A row group of a dataset."""

    file: int
    number: int
    """Its number in the file."""


@dataclass(frozen=True)
class RowsRead:
    """Consecutive rows of a dataset."""

    rows: range
    """Their numbers over all files."""
    table: pa.Table = dataclasses.field(default_factory=lambda: pa.table({}))
    """Their values under our names of the columns."""
    error: str | None = None
    """Why they can't be read; None if they can."""


def row_spans(dataset: PromptDataset, rules: RowRules, limit: int | None = None, since: int = 0) -> Iterator[RowSpan]:
    """The dataset as spans of rows for the planner. Reads nothing but the shape columns, if there are any.

    Args:
        dataset: the dataset.
        rules: what a row gets where it says nothing.
        limit: the row before which to end, over all files; None ends after the last.
        since: the first row.

    Raises:
        InputError: the shape columns can't be decoded.
    """
    shapes = [name for name in SHAPE_COLUMNS if name in dataset.columns]
    for index, file in enumerate(dataset.files):
        count = file.rows if limit is None else min(file.rows, limit - file.first_row)
        skipped = max(0, since - file.first_row)
        if count <= skipped:
            continue
        present = [dataset.columns[name] for name in shapes]
        try:
            present = (
                [name for name in present if name in dataset.open_file(index).schema_arrow.names] if shapes else []
            )
            if not present:
                whole = RowSpan(index, skipped, count - skipped, rules.bucket, rules.num_images)
                yield from _by_group([whole], file)
                continue
            start = 0
            for batch in dataset.open_file(index).iter_batches(columns=present):
                batch = batch.slice(0, count - start)
                unplanned = batch.slice(max(0, skipped - start))
                spans = _spans_of(dataset, index, start + len(batch) - len(unplanned), unplanned, rules)
                yield from _by_group(spans, file)
                start += batch.num_rows
                if start == count:
                    break
            if start != count:
                raise pa.ArrowInvalid("it holds fewer rows than its footer says")
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"prompts file {file.name!r} can't be decoded: {one_line(error, 300)}") from None


def _spans_of(
    dataset: PromptDataset, file: int, start: int, batch: pa.RecordBatch, rules: RowRules
) -> Iterator[RowSpan]:
    codes, distinct = distinct_rows(dataset.named_columns(pa.Table.from_batches([batch])), len(batch))
    shapes = [rules.shape(values)[:2] for values in distinct]
    edges = np.flatnonzero(np.diff(codes)) + 1
    for begin, end in zip([0, *edges.tolist()], [*edges.tolist(), len(codes)], strict=True):
        if end > begin:
            bucket, images = shapes[codes[begin]]
            yield RowSpan(file, start + begin, end - begin, bucket, images)


def _by_group(spans: Iterable[RowSpan], file: PromptFile) -> Iterator[RowSpan]:
    """Spans of a file in order, cut where its row groups end."""
    ends = list(itertools.accumulate(file.groups))
    for span in spans:
        stop = span.start + span.rows
        group = bisect_right(ends, span.start)
        while span.start < stop:
            end = min(stop, ends[group])
            if end > span.start:
                yield span._replace(rows=end - span.start, group=group)
            span = span._replace(start=end)
            group += 1


def planned_groups(dataset: PromptDataset, rows: range) -> list[GroupRows]:
    """The row groups of these rows, which are counted over all files, in order."""
    groups: list[GroupRows] = []
    for index, file in enumerate(dataset.files):
        first = 0
        for group, count in enumerate(file.groups):
            start = max(first, rows.start - file.first_row)
            stop = min(first + count, rows.stop - file.first_row)
            if start < stop:
                groups.append(GroupRows(index, group, start, stop))
            first += count
    return groups


def batches(dataset: PromptDataset, limit: int | None = None, every_column: bool = False) -> Iterator[RowsRead]:
    """All rows, or the first so many, in our columns, a record batch at a time. In a row group, the rows after the
    first that can't be decoded come with the reason.

    Args:
        dataset: the dataset.
        limit: how many rows; None for all.
        every_column: whether the carried columns are decoded, too.

    Raises:
        PromptsChanged: a file can't be read any more.
        StorageError: the store failed for longer than `storage_patience`.
    """
    for index, file in enumerate(dataset.files):
        last = file.first_row + file.rows if limit is None else min(file.first_row + file.rows, limit)
        begin = file.first_row
        for group, count in enumerate(dataset.group_sizes(index)):
            stop = min(begin + count, last)
            if begin < stop:
                yield from _group_batches(dataset, RowGroup(index, group), range(begin, stop), every_column)
            begin += count


def _group_batches(dataset: PromptDataset, group: RowGroup, rows: range, every_column: bool) -> Iterator[RowsRead]:
    begin, stop = rows.start, rows.stop
    wanted = {*dataset.columns.values(), *(dataset.carried.names if every_column else ())}
    try:
        names = dataset.open_file(group.file).schema_arrow.names
        columns = [name for name in names if name in wanted]
        for batch in dataset.open_file(group.file).iter_batches(row_groups=[group.number], columns=columns):
            batch = batch.slice(0, stop - begin)
            yield RowsRead(range(begin, begin + len(batch)), dataset.named_columns(pa.Table.from_batches([batch])))
            begin += len(batch)
            if begin == stop:
                return
        raise pa.ArrowInvalid("it holds fewer rows than its footer says")
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (
            f"row group {group.number} of {dataset.files[group.file].name!r} can't be decoded: {one_line(error, 300)}"
        )
        yield RowsRead(range(begin, stop), error=reason)
