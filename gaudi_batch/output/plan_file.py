"""plan.parquet: the shards of a run."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.plan import Bucket, Shard


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


def decode_plan(data: bytes, rows: int) -> tuple[list[Shard], list[Shard]]:
    """Reads the plan of a run with so many rows. Shards of more rows are passed over: a driver ended before it had
    added these rows to run.json.

    Returns:
        The shards, and those that are retired, since others hold their rows now.

    Raises:
        ValueError: it can't be read, or a value in it can't be.
    """
    try:
        stored = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).to_pylist()
        retired = [_shard(row) for row in stored if row.get("retired")]
        return _of_rows([_shard(row) for row in stored if not row.get("retired")], rows), retired
    except (pa.ArrowException, OSError, KeyError, OverflowError) as error:
        raise ValueError(str(error)) from None


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


def _shard(row: dict[str, Any]) -> Shard:
    """A shard of the stored plan. Raises KeyError or ValueError if the values are none."""
    guidance, only = row["guidance_scale"], row["only"]
    names = ("shard", "file", "start", "stop", "width", "height", "steps", "rows", "images")
    numbers = [row[name] for name in (*names, "failed_before", "images_before")]
    numbers.append(row.get("group", 0))
    if only is not None:
        numbers += only if isinstance(only, list) else [only]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a number of it can't be")
    if not isinstance(guidance, float) or not math.isfinite(guidance):
        raise ValueError("a guidance scale of it can't be")
    return Shard(
        number=row["shard"],
        file=row["file"],
        start=row["start"],
        stop=row["stop"],
        bucket=Bucket(row["width"], row["height"], row["steps"], guidance),
        rows=row["rows"],
        images=row["images"],
        only=None if only is None else tuple(only),
        failed_before=row["failed_before"],
        images_before=row["images_before"],
        group=row.get("group", 0),
    )
