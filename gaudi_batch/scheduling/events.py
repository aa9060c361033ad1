"""What happens to shards, as the driver tells the schedule of it: plain data without Ray, storage or a clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gaudi_batch.plan import BatchKind


@dataclass(frozen=True)
class Reading:
    """A card is about to decode rows of a suspect shard."""

    group: int
    """The row group, counted in its file."""
    span: range
    """All of its rows, counted in the file."""
    rows: range
    """Rows of the shard, over all files, that can't be read if this kills the process."""
    by_row: bool
    """Whether the group is decoded a few rows at a time, now from the first of `rows` on, and not at once."""


@dataclass(frozen=True)
class ShardOutcome:
    """What has become of a shard that was made."""

    rows: int
    failed_rows: int
    """Rows that failed, for whatever reason."""
    raised_rows: int
    """Those that failed in the pipeline."""
    undecoded_rows: int = 0
    """Those that could not be read."""
    seconds: float = 0.0
    """How long its pipeline calls took."""
    transient_failures: int = 0
    """Images and calls that failed and worked when they were made again."""
    doubted: Mapping[int, str] = field(default_factory=dict)
    """Failed rows of which this card's word alone is not enough, with their errors: images that came out wrong twice,
    or could not be encoded."""


@dataclass(frozen=True)
class ShardFailure:
    """Why a shard could not be made by a card whose process lives."""

    error: str
    accused: Mapping[int, str] = field(default_factory=dict)
    """Rows that failed alone, with no other row made afterwards."""
    undecoded: Mapping[int, str] = field(default_factory=dict)
    """Row groups that could not be decoded, with their errors."""
    healthy: bool = True
    """Whether the card has made anything since; a card that has not is replaced."""
    storage: bool = False
    """Whether it was storage that failed, or did not have the prompts that were planned."""


@dataclass(frozen=True)
class SlowReading:
    """A card read the rows of a shard for too long, which says nothing of a row."""


@dataclass(frozen=True)
class StorageStalled:
    """An operation on storage did not end on a card, whatever that was at beside it."""


@dataclass(frozen=True)
class SlowBatch:
    """A batch that passed its time limit before any card had made one of its kind."""

    kind: BatchKind
    limit: str
    """The limit, as the reason of an end names it."""
