"""All rows of a dataset, a record batch at a time: their shapes for the planner, their values for a survey."""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gaudi_batch.dataset.arrow import distinct_rows
from gaudi_batch.dataset.prompt_file import PromptFile
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.dataset.rows import SHAPE_COLUMNS, RowRules
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.plan import Bucket, GroupRows, RowSpan
from gaudi_batch.text import one_line

TURNS = 64
"""Parts of what is left, of which the planner gets one bucket by bucket."""
MIN_ROWS_A_TURN = 64
"""Rows of such a part at least."""


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


def row_spans(
    dataset: PromptDataset, rules: RowRules, limit: int | None = None, since: int = 0, *, scattered: bool = False
) -> Iterator[RowSpan]:
    """The dataset as spans of rows for the planner. Reads nothing but the shape columns, if there are any.

    Args:
        dataset: the dataset.
        rules: what a row gets where it says nothing.
        limit: the row before which to end, over all files; None ends after the last.
        since: the first row.
        scattered: whether rows of one bucket may make a span although others lie between them. Where sizes are mixed,
            these are few, and the others as many as rows.

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
                left = min(dataset.rows, limit or dataset.rows) - file.first_row - spans.start
                yield from _by_group(spans.scattered(left, file) if scattered else spans.consecutive(), file)
                start += batch.num_rows
                if start == count:
                    break
            if start != count:
                raise pa.ArrowInvalid("it holds fewer rows than its footer says")
        except StorageError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"prompts file {file.name!r} can't be decoded: {one_line(error, 300)}") from None


@dataclass(frozen=True)
class _Shapes:
    """What the rows of a record batch ask for.

    Args:
        file: number of their file.
        start: number of the first row in it.
        codes: for each row the number of its shape.
        shapes: buckets and numbers of images.
    """

    file: int
    start: int
    codes: npt.NDArray[np.int64]
    shapes: Sequence[tuple[Bucket, int]]

    def consecutive(self) -> Iterator[RowSpan]:
        """Spans of consecutive rows, in order."""
        edges = (np.flatnonzero(np.diff(self.codes)) + 1).tolist()
        for begin, end in zip([0, *edges], [*edges, len(self.codes)], strict=True):
            if end > begin:
                yield RowSpan(self.file, self.start + begin, end - begin, *self.shapes[self.codes[begin]])

    def scattered(self, left: int, file: PromptFile) -> Iterator[RowSpan]:
        """Spans of rows that are consecutive among those of their bucket, of small parts of what is left: so buckets
        take turns, and each has small shards at the plan's end. No part reaches over the end of a row group.

        Args:
            left: rows of the dataset from the first one on.
            file: their file.
        """
        ends, begin = list(itertools.accumulate(file.groups)), 0
        while begin < len(self.codes):
            end_of_group = ends[bisect_right(ends, self.start + begin)] - self.start
            end = min(begin + max(MIN_ROWS_A_TURN, (left - begin) // TURNS), end_of_group)
            part = _Shapes(self.file, self.start + begin, self.codes[begin:end], self.shapes)
            yield from part._of_buckets()
            begin = end

    def _of_buckets(self) -> Iterator[RowSpan]:
        buckets = {bucket: number for number, (bucket, _) in enumerate(self.shapes)}
        bucket_of = np.array([buckets[bucket] for bucket, _ in self.shapes])[self.codes]
        images_of = np.array([images for _, images in self.shapes])[self.codes]
        order = np.argsort(bucket_of, kind="stable")
        edges = np.flatnonzero(np.diff(bucket_of[order]) | np.diff(images_of[order])) + 1
        spans = []
        for at in np.split(order, edges):
            bucket, images = self.shapes[self.codes[at[0]]]
            spans.append(RowSpan(self.file, self.start + int(at[0]), len(at), bucket, images, at=at + self.start))
        return iter(sorted(spans, key=lambda span: span.start))


def _spans_of(dataset: PromptDataset, file: int, start: int, batch: pa.RecordBatch, rules: RowRules) -> _Shapes:
    codes, distinct = distinct_rows(dataset.named_columns(pa.Table.from_batches([batch])), len(batch))
    return _Shapes(file, start, codes, [rules.shape(values)[:2] for values in distinct])


def _by_group(spans: Iterable[RowSpan], file: PromptFile) -> Iterator[RowSpan]:
    """Spans of a file in order, cut where its row groups end."""
    ends = list(itertools.accumulate(file.groups))
    for span in spans:
        group = bisect_right(ends, span.start)
        while span.rows:
            while ends[group] <= span.start:
                group += 1
            inside = bisect_left(span.at, ends[group]) if span.at is not None else ends[group] - span.start
            rest = span.after(min(span.rows, inside))
            yield span._replace(
                rows=span.rows - rest.rows, group=group, at=None if span.at is None else span.at[:inside]
            )
            span = rest


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
