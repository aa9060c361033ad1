"""plan.parquet: the shards of a run."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gaudi_batch.garbage import no_collections
from gaudi_batch.plan import Bucket, Shard

_NUMBERS = (
    *("shard", "file", "start", "stop", "width", "height", "steps", "rows", "images"),
    *("failed_before", "images_before", "group"),
)
_SINCE_LATER = {"group"}
"""Columns that a plan of an older version does not have; their values are 0."""


def encode_plan(shards: Sequence[Shard], retired: Collection[int] = ()) -> bytes:
    """The file of a plan.

    Args:
        shards: all of it.
        retired: numbers of those whose rows others hold now.
    """
    table = pa.table(
        {
            "shard": [shard.number for shard in shards],
            "file": [shard.file for shard in shards],
            "start": [shard.start for shard in shards],
            "stop": [shard.stop for shard in shards],
            "width": [shard.bucket.width for shard in shards],
            "height": [shard.bucket.height for shard in shards],
            "steps": [shard.bucket.steps for shard in shards],
            "guidance_scale": [shard.bucket.guidance_scale for shard in shards],
            "rows": [shard.rows for shard in shards],
            "images": [shard.images for shard in shards],
            "only": pa.array([shard.only for shard in shards], pa.list_(pa.int64())),
            "failed_before": [shard.failed_before for shard in shards],
            "images_before": [shard.images_before for shard in shards],
            "group": [shard.group for shard in shards],
            "retired": [shard.number in retired for shard in shards],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@no_collections()
def decode_plan(data: bytes, rows: int) -> tuple[list[Shard], list[Shard]]:
    """Reads the plan of a run with so many rows. Shards of more rows are passed over: a driver ended before it had
    added these rows to run.json.

    Returns:
        The shards, and those that are retired, since others hold their rows now.

    Raises:
        ValueError: it can't be read, or a value in it can't be.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        shards = _shards(table)
        flags = table.column("retired").to_pylist() if "retired" in table.column_names else [False] * len(table)
    except (pa.ArrowException, OSError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(str(error)) from None
    kept = [shard for shard, is_retired in zip(shards, flags, strict=True) if not is_retired]
    return _of_rows(kept, rows), [shard for shard, is_retired in zip(shards, flags, strict=True) if is_retired]


def _of_rows(shards: Sequence[Shard], rows: int) -> list[Shard]:
    """A plan up to the first shard with rows beyond so many; shards that make rows again add none."""
    planned, kept = 0, list[Shard]()
    for shard in shards:
        if not shard.is_rerun:
            if planned >= rows:
                break
            planned += shard.rows
        kept.append(shard)
    return kept


def _shards(table: pa.Table) -> list[Shard]:
    """The shards of a stored plan, a column at a time, since there may be a million. Raises KeyError, TypeError,
    ValueError or ArrowException if the values are none."""
    columns: dict[str, list[int]] = {}
    for name in _NUMBERS:
        if name in _SINCE_LATER and name not in table.column_names:
            columns[name] = [0] * len(table)
            continue
        column = table.column(name)
        if not pa.types.is_integer(column.type) or column.null_count or (pc.min(column).as_py() or 0) < 0:
            raise ValueError(f"a number of it can't be: {name}")
        columns[name] = column.to_pylist()
    guidance = table.column("guidance_scale")
    if (
        not pa.types.is_floating(guidance.type)
        or guidance.null_count
        or pc.all(pc.is_finite(guidance)).as_py() is False
    ):
        raise ValueError("a guidance scale of it can't be")
    buckets: dict[tuple[int, int, int, float], Bucket] = {}
    shapes = zip(columns["width"], columns["height"], columns["steps"], guidance.to_pylist(), strict=True)
    bucket_of = [buckets.setdefault(shape, Bucket(*shape)) for shape in shapes]
    only = table.column("only").to_pylist() if table.column("only").null_count < len(table) else [None] * len(table)
    if any(rows is not None and not _are_rows(rows) for rows in only):
        raise ValueError("a row of it can't be")
    return [
        Shard(number, file, start, stop, bucket, rows, images, None if again is None else tuple(again), *rest)
        for number, file, start, stop, bucket, rows, images, again, *rest in zip(
            *(columns[name] for name in ("shard", "file", "start", "stop")),
            bucket_of,
            columns["rows"],
            columns["images"],
            only,
            *(columns[name] for name in ("failed_before", "images_before", "group")),
            strict=True,
        )
    ]


def _are_rows(rows: object) -> bool:
    return isinstance(rows, list) and all(isinstance(row, int) and row >= 0 for row in rows)
