"""The parts of a plan: shards, and what the rows of a shard share. Pure: no Ray, no torch, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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

    @property
    def graph_key(self) -> GraphKey:
        """The graph key of its batches."""
        return GraphKey(self.width, self.height, self.guided)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.steps} steps"


class Bucket(NamedTuple):
    """What the rows of one batch share: width and height in pixels, denoising steps, guidance scale."""

    width: int
    height: int
    steps: int
    guidance_scale: float

    @property
    def work(self) -> int:
        """Pixels times steps of an image, twice that with guidance."""
        return self.width * self.height * self.steps * (2 if self.guidance_scale > 1 else 1)

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
    """Rows of one file that share a bucket and a number of images. They are consecutive, or consecutive among the rows
    of their bucket."""

    file: int
    start: int
    rows: int
    bucket: Bucket
    num_images: int
    group: int = 0
    """The row group of its file in which they lie."""
    at: npt.NDArray[np.intp] | None = None
    """Their numbers in the file; None if they are consecutive."""

    def stop_of(self, rows: int) -> int:
        """The number after that of the last of its first so many rows."""
        return self.start + rows if self.at is None else int(self.at[rows - 1]) + 1

    def after(self, rows: int) -> RowSpan:
        """What is left after so many rows."""
        if self.at is None:
            return self._replace(start=self.start + rows, rows=self.rows - rows)
        rest = self.at[rows:]
        return self._replace(start=int(rest[0]) if len(rest) else 0, rows=self.rows - rows, at=rest)


class GroupRows(NamedTuple):
    """The rows of a row group between the first and the last one that is to be planned."""

    file: int
    group: int
    start: int
    """The first one, counted in its file."""
    stop: int
    """The row after the last one."""


@dataclass(frozen=True, slots=True)
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
    group: int = 0
    """The row group of its file in which it begins; 0 in a plan of an older version."""

    @property
    def is_rerun(self) -> bool:
        """Whether it makes rows of earlier shards again. Its manifest then counts for these rows, and theirs does
        not."""
        return self.only is not None


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
