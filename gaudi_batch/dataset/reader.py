"""The prompt dataset: its files and columns, and the rows of one shard.

A card reads the row groups that its shard touches, and keeps the last one decoded. What reads all rows is in `scan.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.dataset.arrow import distinct_rows, python_rows, take
from gaudi_batch.dataset.columns import cast
from gaudi_batch.dataset.prompt_file import PromptFile, is_footer_of, read_footer, size_mark
from gaudi_batch.dataset.rows import SHAPE_COLUMNS, PromptRow, RowRules, Undecodable, make_row
from gaudi_batch.errors import StorageError
from gaudi_batch.plan import Shard
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.scheduling.events import Reading
from gaudi_batch.storage.listing import mark_of
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

READ_BYTES = 1 << 24
"""Bytes of a request that only finds out whether a file can be read."""
MAX_READINGS = 256
"""Most pieces into which the rows of a shard are cut to be read a few at a time."""


class PromptsChanged(StorageError):
    """The prompts are no longer those that were planned."""


class GroupUndecoded(Exception):
    """A row group could not be decoded here; another card has to try."""

    def __init__(self, group: int, reason: str) -> None:
        super().__init__(reason)
        self.group = group


class PromptDataset:
    """The files of a job's prompts, in sorted order, under one schema.

    Args:
        storage: the base directory.
        files: as `open_prompts` found them.
        columns: what the columns that a job knows are called in the files.
        carried: the columns that manifests carry, in types that all files share.
        carries_all: whether these are all that the files have beside `columns`.
    """

    def __init__(
        self,
        storage: Storage,
        files: list[PromptFile],
        columns: dict[str, str],
        carried: pa.Schema,
        carries_all: bool,
    ) -> None:
        self.storage = storage
        self.files = files
        self.columns = columns
        self.carried = carried
        self.carries_all = carries_all
        self._opened: tuple[int, pq.ParquetFile] | None = None
        self._group: tuple[tuple[int, int], pa.Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None, "_group": None}

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    def read(
        self,
        shard: Shard,
        rules: RowRules,
        task: ShardTask | None = None,
        announce: Callable[[Reading], None] = lambda reading: None,
    ) -> tuple[list[PromptRow], pa.Table]:
        """The rows of one shard in order, and the carried columns of the same rows.

        A row group that can't be decoded costs its own rows only: they come back with the reason as their error.

        Args:
            shard: the shard.
            rules: what a row gets where it says nothing.
            task: what is known from earlier attempts; None asks for no second reader where a row group can't be
                decoded.
            announce: called before each piece is decoded; may wait.

        Raises:
            StorageError: the store failed for longer than `storage_patience`, or the rows are not those of the plan.
            GroupUndecoded: a row group can't be decoded, and no other card has said so yet.
        """
        rows: list[PromptRow] = []
        carried: list[pa.Table] = []
        first = 0
        for group, count in enumerate(self.group_sizes(shard.file)):
            own = _rows_between(shard, first, first + count)
            if own:
                span, first_row = range(first, first + count), self.files[shard.file].first_row
                piece = _Piece(shard, group, span, first_row, own[0], own[-1] + 1)
                piece_rows, table = self._read_piece(piece, rules, task or ShardTask(shard, ""), task is None, announce)
                rows += piece_rows
                carried.append(table)
            first += count
        self.require_unchanged(shard.file, len(rows) == shard.rows)
        return rows, pa.concat_tables(carried) if carried else self.carried.empty_table()

    def _read_piece(
        self, piece: _Piece, rules: RowRules, task: ShardTask, believed: bool, announce: Callable[[Reading], None]
    ) -> tuple[list[PromptRow], pa.Table]:
        try:
            table = self._decode_piece(piece, task, announce)
            places = self._own_places(piece, 0, len(table), self.named_columns(table), rules)
            own = take(table, places)
            values, carried = python_rows(self.named_columns(own)), self._carried(own)
            read = len(table)
            reason = task.unreadable[piece.group][1] if read < piece.count else ""
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            self._require_footer(piece.shard.file)  # else the row group may not be to blame
            name = self.files[piece.shard.file].name
            reason = f"row group {piece.group} of {name!r} can't be decoded: {one_line(error, 300)}"
            if not believed and piece.group not in task.undecoded:
                raise GroupUndecoded(piece.group, reason) from None
            places, values, carried, read = np.empty(0, np.int64), [], self.carried.empty_table(), 0
        rows = [make_row(piece.row(place), each, rules) for place, each in zip(places.tolist(), values, strict=True)]
        if read < piece.count:
            shapes = self._read_shapes(piece, read, reason)
            places = self._own_places(piece, read, piece.count - read, shapes, rules)
            values = python_rows(take(shapes, places - read)) if shapes.num_columns else [{}] * len(places)
            # Without an id and a seed, the row's seed follows from its number.
            unread = {"seed": Undecodable("")} if {"id", "seed"} & self.columns.keys() else {}
            rows += [
                make_row(piece.row(place), each | unread, rules, reason)
                for place, each in zip(places.tolist(), values, strict=True)
            ]
            nulls = pa.table([pa.nulls(len(places), field.type) for field in self.carried], schema=self.carried)
            carried = pa.concat_tables([carried, nulls])
        return rows, carried

    def _own_places(
        self, piece: _Piece, first: int, count: int, named: pa.Table, rules: RowRules
    ) -> npt.NDArray[np.int64]:
        """The places in a piece of those rows that are the shard's own, among `count` of them from `first` on.

        Args:
            piece: the piece.
            first: the first place.
            count: how many.
            named: our columns of these rows; those of their shapes at least.
            rules: what a row gets where it says nothing.
        """
        start = piece.start + first
        own = np.array(_rows_between(piece.shard, start, start + count), np.int64) - start
        shapes = named.select([name for name in SHAPE_COLUMNS if name in named.column_names])
        codes, distinct = distinct_rows(shapes, count)
        fits = np.array([rules.shape(values)[0] == piece.shard.bucket for values in distinct], np.bool_)
        return own[fits[codes[own]]] + first

    def _decode_piece(self, piece: _Piece, task: ShardTask, announce: Callable[[Reading], None]) -> pa.Table:
        """The rows of a piece. If it is read by row, only those before the first unreadable one."""
        if piece.group not in task.by_row:
            announce(Reading(piece.group, piece.span, piece.rows(0), by_row=False))
            return self._decode(piece.shard.file, piece.group).slice(piece.offset, piece.count)
        step = -(-piece.count // MAX_READINGS)
        opened, columns = self.open_file(piece.shard.file), self._needed(piece.shard.file)
        batches = opened.iter_batches(batch_size=step, row_groups=[piece.group], columns=columns)
        decoded_batches: list[pa.RecordBatch] = []
        stop, decoded = piece.offset + piece.count, 0
        unreadable = task.unreadable.get(piece.group, (piece.row(piece.count), ""))[0]
        while decoded < stop:
            place = max(0, decoded - piece.offset)
            if piece.row(place) >= unreadable:
                break
            if decoded == 0 or decoded >= piece.offset:  # everything before the shard's own rows is one step
                announce(Reading(piece.group, piece.span, piece.rows(place), by_row=True))
            batch = next(batches, None)
            if batch is None:
                raise pa.ArrowInvalid("it holds fewer rows than its footer says")
            before = min(len(batch), max(0, piece.offset - decoded))
            decoded_batches.append(batch.slice(before, stop - decoded - before))
            decoded += len(batch)
        return pa.Table.from_batches(decoded_batches) if decoded_batches else opened.schema_arrow.empty_table()

    def read_bytes(self, shard: Shard) -> None:
        """Reads the stored bytes of a shard's row groups, once, and decodes nothing. Raises StorageError."""
        storage, name = self.storage.once(), self.files[shard.file].name
        try:
            metadata = pq.ParquetFile(storage.open(name)).metadata
        except (pa.ArrowException, OSError) as error:
            raise PromptsChanged(f"prompts file {name!r} can't be read any more: {one_line(error, 300)}") from None
        first = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            if _rows_between(shard, first, first + group.num_rows):
                for column in map(group.column, range(group.num_columns)):
                    begin = column.dictionary_page_offset or column.data_page_offset
                    end = begin + column.total_compressed_size
                    for start in range(begin, end, READ_BYTES):
                        storage.get_range(name, start, min(end, start + READ_BYTES))
            first += group.num_rows

    def _read_shapes(self, piece: _Piece, first: int, reason: str) -> pa.Table:
        """Only the shape columns of a piece's rows, from a place on, in a group that can't be decoded: they tell which
        rows are the shard's. They could be read when the job was planned."""
        shapes = [self.columns[name] for name in SHAPE_COLUMNS if name in self.columns]
        if not shapes:
            return pa.table({})
        try:
            table = self.open_file(piece.shard.file).read_row_group(piece.group, columns=shapes)
            shape_table = self.named_columns(table.slice(piece.offset + first, piece.count - first))
        except MemoryError:
            raise  # the card's
        except (pa.ArrowException, OSError, ValueError):
            shape_table = None
        if shape_table is None or (shape_table.num_columns and len(shape_table) != piece.count - first):
            raise PromptsChanged(f"prompts: {reason}")
        return shape_table

    def _decode(self, file: int, group: int) -> pa.Table:
        if self._group is None or self._group[0] != (file, group):
            self._group = None
            table = self.open_file(file).read_row_group(group, columns=self._needed(file))
            if len(table) != self.group_sizes(file)[group]:
                raise pa.ArrowInvalid(f"it holds {len(table)} rows and not as many as its footer says")
            self._group = ((file, group), table)
        return self._group[1]

    def require_unchanged(self, file: int, fits: bool = True, storage: Storage | None = None) -> None:
        """Checks that a file still is what its identity says, as far as its store tells without reading it.

        Args:
            file: which one.
            fits: whether what was read of it fits the plan.
            storage: how to get at it, if not as usual.

        Raises:
            PromptsChanged: it is not.
            StorageError: the store failed.
        """
        identity, name = self.files[file].identity, self.files[file].name
        info = (storage or self.storage).info(name)
        if not (fits and identity.startswith(size_mark(info)) and identity.endswith(mark_of(info))):
            raise PromptsChanged(f"prompts file {name!r} is not what it was when it was planned")

    def _require_footer(self, file: int) -> None:
        """Checks that a file ends as it did when it was planned, which also tells where a store has no marks of
        versions. Raises PromptsChanged or StorageError."""
        self.require_unchanged(file)
        prompts = self.files[file]
        try:
            fits = is_footer_of(prompts.identity, read_footer(self.storage, prompts.name, prompts.size))
        except pa.ArrowException:
            fits = False
        self.require_unchanged(file, fits)

    def group_sizes(self, file: int) -> list[int]:
        """Rows of each row group of a file. Raises PromptsChanged."""
        try:
            metadata = self.open_file(file).metadata
        except (pa.ArrowException, OSError) as error:
            raise PromptsChanged(
                f"prompts file {self.files[file].name!r} can't be read any more: {one_line(error, 300)}"
            ) from None
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _needed(self, file: int) -> list[str]:
        """The columns of a file that a card decodes."""
        needed = {*self.columns.values(), *self.carried.names}
        return [name for name in self.open_file(file).schema_arrow.names if name in needed]

    def open_file(self, file: int) -> pq.ParquetFile:
        """Opens a file that is still what was planned; the last opened file is kept open.

        Raises:
            PromptsChanged: it is not.
            StorageError: the store failed.
        """
        if self._opened is None or self._opened[0] != file:
            self.require_unchanged(file)
            prompts = self.files[file]
            source = self.storage.open(prompts.name, prompts.size)
            self._opened = (file, pq.ParquetFile(source, metadata=prompts.metadata, pre_buffer=True))
        return self._opened[1]

    def named_columns(self, table: pa.Table) -> pa.Table:
        """The columns that the job knows, under our names."""
        present = {name: column for name, column in self.columns.items() if column in table.column_names}
        return table.select(list(present.values())).rename_columns(list(present))

    def _carried(self, table: pa.Table) -> pa.Table:
        columns = [
            cast(table.column(field.name), field.type)
            if field.name in table.column_names
            else pa.nulls(len(table), field.type)
            for field in self.carried
        ]
        return pa.table(columns, schema=self.carried)


@dataclass(frozen=True)
class _Piece:
    """The part of a shard that lies in one row group."""

    shard: Shard
    group: int
    span: range  # rows of the group, by their numbers in the file
    first_row: int  # number of the file's first row over all files
    start: int  # rows of the piece, by their numbers in the file
    stop: int

    @property
    def offset(self) -> int:
        """Rows of the group before the piece."""
        return self.start - self.span.start

    @property
    def count(self) -> int:
        """Rows of the piece."""
        return self.stop - self.start

    def row(self, place: int) -> int:
        """The number over all files of a row of the piece."""
        return self.first_row + self.start + place

    def rows(self, place: int) -> range:
        """The numbers over all files of the piece's rows from one on."""
        return range(self.row(place), self.row(self.count))


def _rows_between(shard: Shard, start: int, stop: int) -> Sequence[int]:
    """The rows of a shard's range, or those that it makes again, from one row of its file to the one before another."""
    if shard.only is None:
        return range(max(shard.start, start), min(shard.stop, stop))
    return shard.only[bisect_left(shard.only, start) : bisect_left(shard.only, stop)]
