"""Roll-ups: the manifests of many shards in one object, so that whoever resumes a run reads few.

A roll-up is two objects of one name. `rollup/<name>.parquet` has the rows of its shards' manifests. Its index,
`rollup/<name>.index.parquet`, has a row for each shard: what the manifest says of its attempt, its failed rows, and the
size and mark (an ETag, or the time of a file) that the manifest has in a listing. The rows are put first. What storage
lists stays the truth: a shard counts as its roll-up says only while the listing shows its manifest with this size and
mark.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gaudi_batch.dataset.columns import cast, plain
from gaudi_batch.layout import ROLLUPS
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.storage.listing import Entry
from gaudi_batch.storage.reading import ReadableStorage
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

READ_THREADS = 16
INDEX_SUFFIX = ".index.parquet"
FAILED_ROWS = pa.schema([("row", pa.int64()), ("id", pa.string()), ("error", pa.string())])
"""What is kept of a failed row."""
_SUMS = {f"sum_{field.name}": pa.int64() if field.type == "int" else pa.float64() for field in fields(ThroughputTotals)}
_INFO = {
    "shard": pa.int64(),
    "attempt": pa.string(),
    "card": pa.string(),
    "node": pa.string(),
    "module": pa.int64(),
    "rows": pa.int64(),
    "failed_rows": pa.int64(),
    "images": pa.int64(),
    "run": pa.string(),
    "again": pa.bool_(),
    "failed_before": pa.int64(),
    "images_before": pa.int64(),
    "finished_at": pa.float64(),
}
_INDEX = pa.schema(
    [
        *_INFO.items(),
        *_SUMS.items(),
        ("bad_rows", pa.list_(pa.int64())),
        ("size", pa.int64()),
        ("mark", pa.string()),
        ("failed", pa.list_(pa.struct(list(FAILED_ROWS)))),
    ]
)
_ADDED = ("sum_energy_j", "sum_energy_images")
"""Columns that the index of an older version has not; they are 0."""
_ROWS_BYTES = b"rows_bytes"


@dataclass(frozen=True, slots=True)
class Commit:
    """A committed shard, as far as a driver keeps it in memory."""

    info: CommitInfo
    entry: Entry | None
    """Its manifest in the listing; None while only the driver that put it knows of it."""
    failed: pa.Table | None
    """Its failed rows, see `FAILED_ROWS`; None if there are none."""


def failed_rows_of(table: pa.Table) -> pa.Table | None:
    """The failed rows of a manifest, see `FAILED_ROWS`; None if there are none."""
    failed = table.filter(pc.equal(table.column("status"), "failed")).select(FAILED_ROWS.names)
    return failed.cast(FAILED_ROWS) if len(failed) else None


def rows_path(name: str) -> str:
    """Where the rows of a roll-up lie."""
    return f"{ROLLUPS}/{name}.parquet"


def index_path(name: str) -> str:
    """Where the index of a roll-up lies."""
    return f"{ROLLUPS}/{name}{INDEX_SUFFIX}"


def index_names(names: Iterable[str]) -> list[str]:
    """The names of the roll-ups in a listing of `rollup`, those without an index left out."""
    return sorted(name.removesuffix(INDEX_SUFFIX) for name in names if name.endswith(INDEX_SUFFIX))


def join_tables(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of manifests in order of row and image. Those of a run that older code began may have other types than
    the first, whose types all get."""
    schema = plain(tables[0].schema.remove_metadata())
    same = [
        table.replace_schema_metadata()
        if table.schema.equals(schema)
        else pa.table([cast(*each) for each in zip(table.columns, schema.types, strict=True)], schema=schema)
        for table in tables
    ]
    return pa.concat_tables(same).sort_by([("row", "ascending"), ("image_index", "ascending")])


def encode_rows(table: pa.Table) -> bytes:
    """The object of a roll-up's rows."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def encode_index(commits: Sequence[Commit], rows_bytes: int) -> bytes:
    """The object of a roll-up's index.

    Args:
        commits: of its shards; each with its entry.
        rows_bytes: size of its rows in memory.
    """
    columns: dict[str, list[Any]] = {name: [getattr(commit.info, name) for commit in commits] for name in _INFO}
    columns |= {name: [getattr(commit.info.sums, name.removeprefix("sum_")) for commit in commits] for name in _SUMS}
    columns["bad_rows"] = [list(commit.info.bad_rows) for commit in commits]
    entries = [commit.entry or Entry(-1, "") for commit in commits]
    columns["size"] = [entry.size for entry in entries]
    columns["mark"] = [entry.mark for entry in entries]
    columns["failed"] = [None if commit.failed is None else commit.failed.to_pylist() for commit in commits]
    table = pa.table(columns, schema=_INDEX.with_metadata({_ROWS_BYTES: str(rows_bytes)}))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def decode_index(data: bytes) -> tuple[list[Commit], int]:
    """The commits of an index, and the size of its rows in memory.

    Raises:
        ValueError: it can't be read, or a value in it can't be.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        rows_bytes = int((table.schema.metadata or {})[_ROWS_BYTES])
        for name in set(_ADDED).difference(table.column_names):
            table = table.append_column(name, pa.array([0] * len(table), _SUMS[name]))
        table = table.select(_INDEX.names).cast(_INDEX)
        if any(table.column(name).null_count for name in ("shard", "attempt", "card", "node", "size", "mark", *_SUMS)):
            raise ValueError("a value of it is missing")
        info_columns = [table.column(name).to_pylist() for name in _INFO]
        sums = map(ThroughputTotals, *(table.column(name).to_pylist() for name in _SUMS))
        bad_rows, sizes, marks, failed = (
            table.column(name).to_pylist() for name in ("bad_rows", "size", "mark", "failed")
        )
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"not a whole index: {one_line(error)}") from None
    return [
        Commit(
            CommitInfo(sums=sums_of, bad_rows=tuple(bad or ()), **dict(zip(_INFO, values, strict=True))),
            Entry(size, mark),
            None if rows is None else pa.Table.from_pylist(rows, FAILED_ROWS),
        )
        for values, sums_of, bad, size, mark, rows in zip(
            zip(*info_columns, strict=True), sums, bad_rows, sizes, marks, failed, strict=True
        )
    ], rows_bytes


@dataclass(frozen=True)
class Index:
    """A roll-up, as far as it says something of a run."""

    name: str
    commits: Mapping[int, Commit]
    """Those that count, by shard."""
    rows_bytes: int
    """Size in memory of all its rows."""
    whole: bool
    """Whether all of its commits count."""


def read_indexes(
    storage: ReadableStorage, listed: Mapping[int, Entry], is_of_run: Callable[[CommitInfo], bool]
) -> Iterator[Index]:
    """The roll-ups of an output of which something counts. Each shard is in the first that has it.

    Args:
        storage: the output.
        listed: the manifests in the listing, by shard.
        is_of_run: whether a manifest is one of the run.

    Raises:
        StorageError: storage failed.
    """
    names = index_names(storage.names(ROLLUPS))
    known: set[int] = set()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        indexes = pool.map(storage.get, map(index_path, names))
        for name, data in zip(names, indexes, strict=True):
            try:
                commits, rows_bytes = decode_index(data or b"")
            except ValueError as error:
                log.warning("%s/%s is passed over: %s", storage.url, index_path(name), one_line(error))
                continue
            counting = {
                commit.info.shard: commit
                for commit in commits
                if listed.get(commit.info.shard) == commit.entry
                and commit.info.shard not in known
                and is_of_run(commit.info)
            }
            if counting:
                known |= counting.keys()
                yield Index(name, counting, rows_bytes, len(counting) == len(commits))


def keep_latest(table: pa.Table, latest_shard_of_row: Mapping[int, int]) -> pa.Table:
    """The rows of a table of manifests that count; the table itself if all do.

    Args:
        table: the table.
        latest_shard_of_row: rows of several shards, with the highest of these, which alone counts.
    """
    if not latest_shard_of_row:
        return table
    rows, shards = table.column("row").to_pylist(), table.column("shard").to_pylist()
    counts = [latest_shard_of_row.get(row, 0) <= shard for row, shard in zip(rows, shards, strict=True)]
    return table if all(counts) else table.filter(pa.array(counts, pa.bool_()))


def counting(latest_shard_of_row: Mapping[int, int]) -> pc.Expression:
    """The same as `keep_latest`, as an expression for datasets. It is two look-ups, however many rows there are: one
    condition for each would be nested so deep that the stack overflows.

    Args:
        latest_shard_of_row: as there; one row at least.
    """
    row, shard = pc.field("row"), pc.field("shard")
    rows, shards = (pa.array(numbers, pa.int64()) for numbers in zip(*latest_shard_of_row.items(), strict=True))
    factor = max(latest_shard_of_row) + 1  # no two pairs of a shard and one of these rows give the same number
    latest = pc.add(pc.multiply(shards, factor), rows)
    return ~row.isin(rows) | (shard * factor + row).isin(latest)


def keep_shards(table: pa.Table, shards: Iterable[int]) -> pa.Table:
    """The rows of some shards in a table of manifests."""
    return table.filter(pc.is_in(table.column("shard"), pa.array(shards, pa.int64())))
