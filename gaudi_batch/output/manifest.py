"""The manifest: one row per image or failed row; that of a shard is its commit."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from gaudi_batch.config.bounds import MAX_SEED
from gaudi_batch.dataset.rows import PromptRow, image_seed
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.text import one_line

COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("image_index", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("steps", pa.int32()),
        ("guidance_scale", pa.float64()),
        ("nsfw", pa.bool_()),
        ("truncated", pa.bool_()),
        ("shard", pa.int64()),
        ("card", pa.string()),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)
MEMBER = "member"
"""The column after `path` where that is an object with many images: the name of the image in it."""
_WITH_MEMBER = COLUMNS.insert(COLUMNS.get_field_index("path") + 1, pa.field(MEMBER, pa.string()))
NOT_DESCRIPTIVE = ("status", "error", "path", "sha256", "shard", "card", "finished_at")
"""Columns that say where, when or whether an image was made. The others say what it is, and are the same whichever card
makes it."""
FILES = "files"
"""The format of one object an image."""
_METADATA_KEY = b"gaudi_batch"
MAX_BAD_ROWS = 10_000
"""Most failed rows that a commit names; a footer that names millions can't be read. The others are tried again in
vain."""


@dataclass(frozen=True)
class StoredImage:
    """An image that is in storage."""

    path: str
    """Relative to the output."""
    sha256: str
    finished_at: datetime
    encode_s: float
    upload_s: float
    member: str | None = None
    """Its name in the object, if that has many images."""


@dataclass(frozen=True)
class ImageInfo:
    """What a manifest says of one image."""

    stored: StoredImage
    seed: int
    """The seed that it was made with."""
    nsfw: bool | None
    truncated: bool


@dataclass(frozen=True, slots=True)
class CommitInfo:
    """What a shard's manifest says of its attempt, in the metadata of the Parquet file."""

    shard: int
    attempt: str
    card: str
    node: str
    module: int | None
    rows: int
    failed_rows: int
    images: int
    sums: ThroughputTotals
    run: str = ""
    """Id of the run; a manifest of another is no commit of this one."""
    again: bool = False
    """Whether the shard makes rows of earlier shards again. Its manifest then counts for these rows, and theirs does
    not."""
    failed_before: int = 0
    """Failed rows of the earlier manifests."""
    images_before: int = 0
    """Images of the earlier manifests."""
    finished_at: float | None = None
    """When its last image was stored, in seconds since the epoch by the driver's clock; None from an older version,
    which has it by the clock of the card's node alone."""
    bad_rows: tuple[int, ...] = ()
    """Rows that no card can run, since their own data is against the rules: at most MAX_BAD_ROWS; none from an older
    version."""
    format: str = FILES
    """How its images are kept; an older version knew files alone."""
    object_sha256: str = ""
    """Of the object that has all of the shard's images; empty where each is an object, or none was made."""
    retired: bool = False
    """Whether it stands for no images, and only takes the place of any manifest of its shard, whose rows other shards
    hold now."""

    @property
    def has_members(self) -> bool:
        """Whether its images are in one object."""
        return self.format != FILES

    @classmethod
    def retiring(cls, shard: int, run: str) -> CommitInfo:
        """What the manifest says that retires a shard."""
        return cls(shard, f"retired{shard}", "", "", None, 0, 0, 0, ThroughputTotals(), run, retired=True)


_INFO = TypeAdapter(CommitInfo)


def schema(carried: pa.Schema, *, has_members: bool = False) -> pa.Schema:
    """The columns of a job's manifest. A carried column that has the name of one of its own gets `input_` before it.

    Args:
        carried: the carried columns.
        has_members: whether objects have many images.
    """
    own = _WITH_MEMBER if has_members else COLUMNS
    return pa.schema([*own, *renamed(carried, own.names)])


def renamed(columns: pa.Schema, taken: Iterable[str]) -> pa.Schema:
    """Columns with `input_` before each name that is taken."""
    reserved = set(taken)
    names = reserved | set(columns.names)
    fields = []
    for field in columns:
        name = field.name
        if name in reserved:
            while name in names:
                name = f"input_{name}"
            names.add(name)
        fields.append(field.with_name(name))
    return pa.schema(fields)


def tabulate(
    rows: Sequence[PromptRow],
    carried: pa.Table,
    images: Mapping[tuple[int, int], ImageInfo],
    failures: Mapping[int, str],
    run_seed: int,
    commit: CommitInfo,
) -> pa.Table:
    """The rows of the manifest of one shard.

    Args:
        rows: the shard's rows.
        carried: their carried columns, in the same order.
        images: what was made, by (row, image number); whole rows only.
        failures: the other rows' errors.
        run_seed: seed of the run, from which a failed row has its first image's.
        commit: what is recorded of the attempt.
    """
    records: list[dict[str, Any]] = []
    take: list[int] = []
    for place, row in enumerate(rows):
        common = {
            "id": row.id,
            "row": row.row,
            "prompt": row.prompt,
            "negative_prompt": row.negative_prompt,
            "shard": commit.shard,
            "card": commit.card,
        }
        common |= row.bucket._asdict() if row.num_images else row.asked
        if row.row in failures:
            records.append(
                common
                | {"status": "failed", "error": failures[row.row], "finished_at": datetime.now(timezone.utc)}
                | ({"seed": image_seed(run_seed, row, 0)} if row.has_seed else {})
            )
            take.append(place)
            continue
        for number in range(row.num_images):
            image = images[row.row, number]
            records.append(
                common
                | {
                    "image_index": number,
                    "status": "ok",
                    "path": image.stored.path,
                    MEMBER: image.stored.member,
                    "sha256": image.stored.sha256,
                    "seed": image.seed,
                    "nsfw": image.nsfw,
                    "truncated": image.truncated,
                    "finished_at": image.stored.finished_at,
                }
            )
            take.append(place)
    own = _WITH_MEMBER if commit.has_members else COLUMNS
    table = pa.Table.from_pylist(records, own)
    extra = carried.take(pa.array(take, pa.int64()))
    whole = schema(carried.schema, has_members=commit.has_members)
    return pa.table([*table.columns, *extra.columns], schema=whole)


def build(
    rows: Sequence[PromptRow],
    carried: pa.Table,
    images: Mapping[tuple[int, int], ImageInfo],
    failures: Mapping[int, str],
    run_seed: int,
    commit: CommitInfo,
) -> bytes:
    """The manifest of one shard as a Parquet file, from what `tabulate` takes."""
    return encode(tabulate(rows, carried, images, failures, run_seed, commit), commit)


def with_finish(table: pa.Table, time: datetime) -> pa.Table:
    """The rows of a manifest whose images were all stored at one time."""
    place = table.schema.get_field_index("finished_at")
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array([time] * len(table), field.type))


def described(table: pa.Table, *, has_members: bool) -> pa.Table:
    """The rows of a manifest without the columns that say where, when or whether an image was made.

    Args:
        table: the rows.
        has_members: whether objects have many images; else a column `member` is a carried one.
    """
    return table.drop_columns([*NOT_DESCRIPTIVE, *([MEMBER] if has_members else [])])


def encode(table: pa.Table, commit: CommitInfo) -> bytes:
    """The manifest of one shard as a Parquet file.

    Args:
        table: its rows, from `tabulate`.
        commit: what is recorded of the attempt.
    """
    buffer = io.BytesIO()
    metadata = {_METADATA_KEY: json.dumps(asdict(commit)).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    return buffer.getvalue()


def read(data: bytes) -> tuple[pa.Table, CommitInfo]:
    """Reads a shard's manifest and what it says of its attempt.

    Raises:
        ValueError: the bytes are not a whole manifest.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        info = _INFO.validate_json((table.schema.metadata or {})[_METADATA_KEY], strict=True)
        numbers = [info.shard, info.rows, info.failed_rows, info.images, *asdict(info.sums).values()]
        numbers.append(info.finished_at or 0)
        if not all(0 <= number <= MAX_SEED for number in numbers):
            raise ValueError("a number of its attempt can't be")
        return table, info
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"not a whole manifest: {one_line(error)}") from None


def finished_at(table: pa.Table, info: CommitInfo) -> float | None:
    """When the last image of a manifest was stored, in seconds since the epoch, by the driver's clock if the manifest
    has that, else by the clock of the card's node; None if it has neither, or no row."""
    if info.finished_at is not None:
        return info.finished_at
    last = pc.max(table.column("finished_at")).cast(pa.timestamp("us", tz="UTC")).value
    return None if last is None else last / 1e6


def require_readable(path: Path, rows: int) -> None:
    """Reads a file of manifests whole, part by part.

    Args:
        path: of the local file.
        rows: how many it must have.

    Raises:
        ValueError: it can't be read, or has another number of rows.
    """
    try:
        with pq.ParquetFile(path) as file:
            count = sum(batch.num_rows for batch in file.iter_batches())
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"what was written can't be read back: {one_line(error)}") from None
    if count != rows:
        raise ValueError(f"what was written has {count} rows, and {rows} were to be")
