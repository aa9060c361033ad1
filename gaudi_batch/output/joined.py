"""manifest.parquet: all manifests of a run as one file, in order of row, or as a directory of files if it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gaudi_batch.dataset.columns import cast, plain
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import IMAGES, JOINED, METADATA
from gaudi_batch.output import manifest, rollup
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.formats.image_folder import ImageFolder
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.storage.scratch import scratch_directory, scratch_errors
from gaudi_batch.text import one_line

SORTED_BYTES = 512 << 20
"""Manifests are sorted in memory up to this size, about two million images; sorting takes as much again."""
GROUP_BYTES = 64 << 20
"""Size in memory of the manifests that make one row group."""
_ORDER = [("row", "ascending"), ("image_index", "ascending")]


class JoinedManifest:
    """Writes the file: in order of row and image if its rows take at most SORTED_BYTES in memory, else in order of
    shards."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._schema: pa.Schema | None = None
        self._buffered: list[pa.Table] = []
        self._bytes = 0

    def __enter__(self) -> JoinedManifest:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None and self._schema is not None:
                self._end()
        finally:
            if self._writer is not None:
                self._writer.close()

    def add(self, table: pa.Table) -> None:
        """Adds the rows of one manifest. Those of a run that older code began may have other types than the first."""
        if self._schema is None:
            self._schema = plain(table.schema.remove_metadata())
        columns = [cast(*each) for each in zip(table.columns, self._schema.types, strict=True)]
        table = pa.table(columns, schema=self._schema)
        self._buffered.append(table)
        self._bytes += table.nbytes
        if self._bytes >= (SORTED_BYTES if self._writer is None else GROUP_BYTES):
            self._write_waiting()

    def _end(self) -> None:
        if self._writer is None and self._buffered:
            whole = pa.concat_tables(self._buffered)
            self._buffered.clear()
            order = pc.sort_indices(whole.select([name for name, _ in _ORDER]), _ORDER)
            if not np.array_equal(order.to_numpy(), np.arange(len(whole))):
                whole = whole.take(order)
            self._buffered.append(whole)
        self._write_waiting()

    def _write_waiting(self) -> None:
        if not self._buffered:
            return
        self._writer = self._writer or pq.ParquetWriter(self._path, self._schema, compression="zstd")
        whole = pa.concat_tables(self._buffered)
        self._writer.write_table(whole, row_group_size=max(1, len(whole) * GROUP_BYTES // max(1, self._bytes)))
        self._buffered.clear()
        self._bytes = 0


def join_manifests(
    commits: Commits,
    latest_shard_of_row: Mapping[int, int],
    seen: Callable[[pa.Table], None] = lambda table: None,
    images_are_files: bool = True,
) -> tuple[int, int]:
    """Writes manifest.parquet, all manifests of a run as one, and makes sure that it can be read. Where it would take
    more than SORTED_BYTES in memory it is a directory of files, one for each roll-up.

    Args:
        commits: what is committed of the run.
        latest_shard_of_row: rows of several shards, with the highest of these, which alone counts.
        seen: called with rows that count, some at a time.
        images_are_files: whether each image is an object; `images/metadata.parquet` is written, too, then.

    Returns:
        Its images and its failed rows.

    Raises:
        StorageError: what was written is not what is there, or a roll-up has not the rows that it had.
    """
    if not commits.by_shard:
        return 0, 0
    counted = _Counted(seen)
    names = commits.ledger.storage.names(JOINED)
    if commits.rows_bytes > SORTED_BYTES or names not in ([], [JOINED]):
        # Until it is written again, nobody may take the directory, half new, for that of a complete run.
        commits.ledger.remove("summary.json")
    with scratch_directory("join the manifests") as directory:
        folder = ImageFolder(Path(directory) / METADATA) if images_are_files else None
        if commits.rows_bytes > SORTED_BYTES:
            if names == [JOINED]:
                commits.ledger.remove(JOINED)  # the file
            _join_into_directory(commits, latest_shard_of_row, counted, folder)
        else:
            if names not in ([], [JOINED]):
                commits.ledger.remove(JOINED)  # the directory
            _join_into_file(commits, latest_shard_of_row, counted, folder, Path(directory) / JOINED)
        if folder is not None and folder.close():
            commits.ledger.put_file(f"{IMAGES}/{METADATA}", Path(directory) / METADATA)
    return counted.rows - counted.failed, counted.failed


@dataclass
class _Counted:
    """Counts the rows that count."""

    seen: Callable[[pa.Table], None]
    rows: int = 0
    failed: int = 0

    def add(self, table: pa.Table) -> None:
        self.seen(table)
        self.rows += len(table)
        self.failed += pc.sum(pc.equal(table.column("status"), "failed")).as_py() or 0


def _join_into_file(
    commits: Commits, latest_shard_of_row: Mapping[int, int], counted: _Counted, folder: ImageFolder | None, path: Path
) -> None:
    ledger = commits.ledger
    try:
        with JoinedManifest(path) as file:
            for table in commits.tables(latest_shard_of_row):
                counted.add(table)
                file.add(table)
        manifest.require_readable(path, counted.rows)
        with pq.ParquetFile(path) as joined:
            for group in range(joined.num_row_groups):
                _describe(joined.read_row_group(group), folder)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StorageError(
            f"can't join the manifests in {path.parent}: {one_line(error)}; those in manifest/ are as they were"
        ) from None
    ledger.put_file(JOINED, path)
    _require_size(ledger, JOINED, path.stat().st_size)


def _join_into_directory(
    commits: Commits, latest_shard_of_row: Mapping[int, int], counted: _Counted, folder: ImageFolder | None
) -> None:
    """Copies the rows of each roll-up, without those that do not count."""
    ledger = commits.ledger
    commits.roll_up_rest()
    schema: pa.Schema | None = None
    names = {f"{part.name}.parquet" for part in commits.parts}
    for name in ledger.storage.names(JOINED):
        if name not in names:
            ledger.remove(f"{JOINED}/{name}")
    for part in commits.parts:
        data = commits.bytes_of(part)
        rows = commits.rows_of(part, data)
        table = rollup.keep_latest(rows, latest_shard_of_row)
        schema = schema or table.schema
        if not part.whole or table is not rows or table.schema != schema:
            columns = [cast(*each) for each in zip(table.columns, schema.types, strict=True)]
            data = rollup.encode_rows(pa.table(columns, schema=schema))
        counted.add(table)
        _describe(table, folder)
        path = f"{JOINED}/{part.name}.parquet"
        ledger.put(path, data)
        _require_size(ledger, path, len(data))


def begin_description(ledger: Ledger) -> None:
    """Writes an `images/metadata.parquet` that names no image, unless there is one: where there is none, loaders take
    every image that they find. Raises StorageError."""
    if ledger.storage.entry(f"{IMAGES}/{METADATA}") is None:
        _put_description(ledger, [])


def put_description(commits: Commits, latest_shard_of_row: Mapping[int, int]) -> None:
    """Writes `images/metadata.parquet` of what is committed now; images that are committed meanwhile may be missing.
    Raises StorageError."""
    _put_description(commits.ledger, commits.tables(latest_shard_of_row))


def _put_description(ledger: Ledger, tables: Iterable[pa.Table]) -> None:
    use = "describe the images"
    with scratch_directory(use) as directory, scratch_errors(use):
        folder = ImageFolder(Path(directory) / METADATA)
        for table in tables:
            _describe(table, folder)
        if not folder.close():
            _describe(manifest.COLUMNS.empty_table(), folder)
            folder.close()
        ledger.put_file(f"{IMAGES}/{METADATA}", Path(directory) / METADATA)


def _describe(table: pa.Table, folder: ImageFolder | None) -> None:
    """Adds rows of manifests to the description of the directory of images."""
    if folder is None:
        return
    table = table.filter(pc.is_valid(table.column("path")))
    names = pc.utf8_slice_codeunits(table.column("path"), len(f"{IMAGES}/"))
    folder.add(names, manifest.described(table, has_members=False))


def _require_size(ledger: Ledger, path: str, written: int) -> None:
    entry = ledger.storage.entry(path)
    if entry is None or entry.size != written:
        stored = "is not there" if entry is None else f"has {entry.size} bytes"
        raise StorageError(f"{ledger.storage.url}: {path} {stored}, and {written} bytes were written")
