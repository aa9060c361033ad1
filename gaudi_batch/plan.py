"""From a dataset's row counts and shapes to shards. Pure: no Ray, no torch, no clock, no I/O.

A dataset reaches the planner as runs: stretches of consecutive rows of one file that ask for the same thing. Without
per-row shape columns a file is one run, so that planning costs nothing per row. The planner keeps one open shard for
each bucket and closes it when it is full or its file ends. A shard is therefore named by a row range and a bucket
alone; the ranges of two buckets may overlap, and no row list is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

TAIL_SHARE = 0.1
"""The share of the rows, at the end of the plan, that goes into smaller shards, so that the cards finish together."""
TAIL_DIVISOR = 4
"""How many times smaller those shards are."""


class GraphKey(NamedTuple):
    """A card captures a new HPU graph for each of these."""

    width: int
    height: int
    guided: bool


class BatchKind(NamedTuple):
    """What the duration of a batch depends on."""

    width: int
    height: int
    steps: int
    guided: bool

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.steps} steps"


class Bucket(NamedTuple):
    """What the rows of one batch share: width and height in pixels, denoising steps, guidance scale."""

    width: int
    height: int
    steps: int
    guidance_scale: float

    @property
    def graph_key(self) -> GraphKey:
        """Diffusers runs classifier-free guidance, which doubles the UNet's batch, only above a scale of 1."""
        return GraphKey(self.width, self.height, self.guidance_scale > 1)

    @property
    def batch_kind(self) -> BatchKind:
        """The kind of its batches, by which their time limits go."""
        return BatchKind(self.width, self.height, self.steps, self.guidance_scale > 1)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.steps} steps, guidance {self.guidance_scale:g}"


class RowSpan(NamedTuple):
    """Consecutive rows of one file that share a bucket and a number of images."""

    file: int
    start: int
    rows: int
    bucket: Bucket
    num_images: int


@dataclass(frozen=True)
class Shard:
    """The unit of dispatch and of commit: the rows of `bucket` out of rows `start` to `stop` of one file."""

    number: int
    """Position in the plan; names the shard's objects."""
    file: int
    """Index of the file among the dataset's sorted files."""
    start: int
    """First row, counted in its file."""
    stop: int
    """The first row after it."""
    bucket: Bucket
    """What its rows share."""
    rows: int
    """Rows of the bucket in the range, including those that can't be run."""
    images: int
    """Images that its rows ask for; about so many if it makes rows again."""
    only: tuple[int, ...] | None = None
    """If the shard makes rows again: these rows alone, counted in their file."""
    failed_before: int = 0
    """How many of these had failed."""
    images_before: int = 0
    """How many images of theirs manifests name already, of which at least one of each row is missing or torn."""

    @property
    def is_rerun(self) -> bool:
        """Whether it makes rows of earlier shards again. Its manifest then counts for these rows, and theirs does
        not."""
        return self.only is not None


def plan_shards(
    runs: Iterable[RowSpan], total_rows: int, shard_size: int, batch_size: int, num_images: int = 1, first: int = 0
) -> Iterator[Shard]:
    """Cuts a dataset into shards.

    Args:
        runs: the rows, in order of file and row.
        total_rows: rows in all runs together.
        shard_size: about how many rows a shard holds. It is rounded to whole batches, and is never less than one.
        batch_size: images of one pipeline call.
        num_images: images that a row of the job usually asks for.
        first: number of the first shard.

    Yields:
        Shards in order of their numbers, which hold every row once.
    """
    unit = batch_size // math.gcd(batch_size, num_images)
    full = _whole_batches(shard_size, unit)
    small = _whole_batches(max(1, shard_size // TAIL_DIVISOR), unit)
    tail_from = total_rows - total_rows * TAIL_SHARE
    opened: dict[Bucket, _OpenShard] = {}
    number, seen = first, 0
    current_file = -1
    for run in runs:
        if run.file != current_file:
            for shard in sorted(opened.values(), key=lambda shard: shard.start):
                yield shard.close(number)
                number += 1
            opened.clear()
            current_file = run.file
        start, left = run.start, run.rows
        while left:
            shard = opened.get(run.bucket) or _OpenShard(
                run.file, start, run.bucket, small if seen >= tail_from else full
            )
            opened[run.bucket] = shard
            taken = min(left, shard.capacity - shard.rows)
            shard.rows += taken
            shard.images += taken * run.num_images
            start, left, seen = start + taken, left - taken, seen + taken
            shard.stop = start
            if shard.rows == shard.capacity:
                yield opened.pop(run.bucket).close(number)
                number += 1
    for shard in sorted(opened.values(), key=lambda shard: shard.start):
        yield shard.close(number)
        number += 1


@dataclass
class _OpenShard:
    file: int
    start: int
    bucket: Bucket
    capacity: int
    rows: int = 0
    images: int = 0
    stop: int = 0

    def close(self, number: int) -> Shard:
        return Shard(number, self.file, self.start, self.stop, self.bucket, self.rows, self.images)


def _whole_batches(rows: int, unit: int) -> int:
    return max(1, round(rows / unit)) * unit


@dataclass(frozen=True)
class PlanSummary:
    """The size of a plan."""

    shards: int
    rows: int
    images: int
    batches: int
    padding: int
    """Images that fill up short batches and are dropped."""

    @property
    def padding_share(self) -> float:
        """Padding among all images generated, 0 to 1."""
        return self.padding / max(1, self.padding + self.images)


def summarize(shards: Iterable[Shard], batch_size: int) -> dict[Bucket, PlanSummary]:
    """The size of a plan, and of each bucket in order of first appearance."""
    summaries: dict[Bucket, PlanSummary] = {}
    for shard in shards:
        batches = -(-shard.images // batch_size)
        so_far = summaries.get(shard.bucket, PlanSummary(0, 0, 0, 0, 0))
        summaries[shard.bucket] = PlanSummary(
            so_far.shards + 1,
            so_far.rows + shard.rows,
            so_far.images + shard.images,
            so_far.batches + batches,
            so_far.padding + batches * batch_size - shard.images,
        )
    return summaries
