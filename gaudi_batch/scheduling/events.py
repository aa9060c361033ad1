"""What happens in a run, told to the schedule as plain data without Ray, storage or a clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gaudi_batch.plan import BatchKind

# -- what events say of shards ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A card is about to decode rows of a suspect shard."""

    group: int
    """The row group, by its number in the file."""
    span: range
    """All rows of the group, by their numbers in the file."""
    rows: range
    """Rows of the shard, counted over all files, that can't be read if this kills the process."""
    by_row: bool
    """Whether the group is decoded not at once but a few rows at a time, now from the first of `rows` on."""


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a shard that was made."""

    rows: int
    failed_rows: int
    """Rows that failed, for whatever reason."""
    raised_rows: int
    """Failed rows for which the pipeline was called."""
    undecoded_rows: int = 0
    """Failed rows that could not be read."""
    seconds: float = 0.0
    """Seconds of its pipeline calls."""
    transient_failures: int = 0
    """Images and calls that failed and worked when repeated."""
    doubted: Mapping[int, str] = field(default_factory=dict)
    """Failed rows that another card has to confirm, with their errors: images that were wrong twice, or could not be
    encoded."""


@dataclass(frozen=True)
class ShardFailure:
    """Why a shard could not be made by a card whose process lives."""

    error: str
    failed_alone_once: Mapping[int, str] = field(default_factory=dict)
    """Rows that failed alone, after which the card made no other row."""
    undecoded: Mapping[int, str] = field(default_factory=dict)
    """Row groups that could not be decoded, with their errors."""
    healthy: bool = True
    """Whether the card has made anything since; one that has not is replaced."""
    storage: bool = False
    """Whether storage was the cause: it failed, or did not have the prompts that were planned."""


@dataclass(frozen=True)
class SlowReading:
    """A card took too long to read the rows of a shard, which says nothing of a row."""


@dataclass(frozen=True)
class StorageStalled:
    """An operation on storage did not end on a card, whatever else the card was doing."""


@dataclass(frozen=True)
class SlowBatch:
    """A batch passed its time limit before any card had made one of its kind."""

    kind: BatchKind
    limit: str
    """The limit, as reasons for a stop name it."""


@dataclass(frozen=True)
class LargeBatch:
    """The device of a card that held nothing else had no memory left for a batch."""

    kind: BatchKind
    batch_size: int
    shard: int
    """Of whose rows it was."""
    texts_differ: bool = False
    """Whether texts are padded to different lengths, so that other batches of the size may be smaller."""


# -- the cluster ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capacity:
    """What the cluster has for a job."""

    cards: int
    """Cards of the cluster that the job may have, whether others hold them or not."""
    total_cards: int
    """All cards of the cluster, including those that may replace failed ones."""
    nodes: frozenset[str]
    """Ids of the nodes that are up."""
    leaving: frozenset[str]
    """Ids of the nodes that have announced their end."""


@dataclass(frozen=True)
class ClusterSeen:
    """What the cluster has now."""

    capacity: Capacity
    now: float
    """Seconds, monotonic."""


@dataclass(frozen=True)
class TimePassed:
    """Nothing else has happened; the driver says so now and then while a card idles."""

    now: float
    """Seconds, monotonic."""


@dataclass(frozen=True)
class RunFailed:
    """Something failed for the driver that the run can't do without: its storage, or Ray."""

    reason: str


@dataclass(frozen=True)
class RaySilent:
    """Ray has not answered the driver's question yet."""

    seconds: float
    """For so long."""


@dataclass(frozen=True)
class StopRequested:
    """Somebody asked the run to stop: it begins no more work and finishes what has begun."""

    reason: str


@dataclass(frozen=True)
class StopForced:
    """The run ends now, whatever has begun: the grace is over, a second signal came, or the lease is lost."""

    reason: str


# -- cards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CardPlaced:
    """The cluster has given a card its place, and its first process is being started there."""

    card: int
    node: str = ""
    """Id of its node."""


@dataclass(frozen=True)
class LoadedCard:
    """What a card reports that has loaded its pipeline."""

    name: str
    """The card's name."""
    node_id: str
    """The id of its node; Ray may have moved its place since."""
    node: str
    """The node's host name."""
    module: int | None
    """The module that Ray pinned; None where the device has none."""
    stack: Mapping[str, str]
    """The versions and settings that shape its images, by name."""
    model: str
    """The commit or SHA-256 of the model that it has loaded."""
    cpus: int
    """How many CPUs its process may use."""


@dataclass(frozen=True)
class CardLoaded:
    """A card's process has loaded its pipeline."""

    card: int
    loaded: LoadedCard
    now: float
    """Seconds, monotonic."""


@dataclass(frozen=True)
class CardDied:
    """A card's process ended, or was killed for passing a limit, and its node is still there."""

    card: int
    error: str
    slow: SlowBatch | SlowReading | StorageStalled | LargeBatch | None = None
    """What it was killed for, if that says nothing of a row: storage that stalled, a reading that took too long, a
    batch of a kind that no card has made, or one for which the device had no memory left."""


@dataclass(frozen=True)
class CardBroken:
    """A card's process reports that it can't go on: it could not load its pipeline, or its device failed."""

    card: int
    error: str
    storage: bool = False
    """Whether storage kept failing while it loaded, which says little of the card."""
    large: LargeBatch | None = None
    """The batch for which its device had no memory left, if that is why."""


@dataclass(frozen=True)
class CardGone:
    """A card left with its node."""

    card: int


@dataclass(frozen=True)
class CardLeaving:
    """A card's node has announced its end."""

    card: int


# -- attempts at shards -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardBegun:
    """A card has begun to read a shard, or to make it."""

    attempt: str
    generating: bool
    now: float | None = None
    """Seconds, monotonic, by the driver's clock; None in the log of a version without it."""


@dataclass(frozen=True)
class ReadingAnnounced:
    """A card is about to decode rows of a suspect shard."""

    attempt: str
    reading: Reading


@dataclass(frozen=True)
class BatchAnnounced:
    """A card is about to call the pipeline for these rows of a suspect shard."""

    attempt: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class ShardMade:
    """A card has made a shard and returned its record."""

    attempt: str
    outcome: ShardOutcome


@dataclass(frozen=True)
class DoubtsChecked:
    """A card has made the doubted rows of a held record again, alone."""

    attempt: str
    failures: Mapping[int, str]
    """The rows that failed on this card, too, with their errors."""


@dataclass(frozen=True)
class ShardFailed:
    """A card could not make a shard, and its process lives."""

    attempt: str
    failure: ShardFailure


@dataclass(frozen=True)
class RecallAnswered:
    """A card has answered a recall of a shard."""

    attempt: str
    given_back: bool
    """Whether it gave the shard back because it had not begun it."""


@dataclass(frozen=True)
class AttemptEnded:
    """A card is done with an attempt that it was told to drop."""

    card: int
    attempt: str


@dataclass(frozen=True)
class ShardCommitted:
    """The manifest of a shard is stored, by this driver or another."""

    shard: int


@dataclass(frozen=True)
class StorageChecked:
    """The driver has checked storage itself, as `CheckStorage` asked."""

    shard: int
    """The shard whose rows it has read."""
    error: str | None = None
    """How storage failed for the driver; None if it did not."""
    of_shard: str | None = None
    """How these rows alone failed; no card can then make the shard. None if they did not."""


Event: TypeAlias = (
    ClusterSeen
    | TimePassed
    | RunFailed
    | RaySilent
    | StopRequested
    | StopForced
    | CardPlaced
    | CardLoaded
    | CardDied
    | CardBroken
    | CardGone
    | CardLeaving
    | ShardBegun
    | ReadingAnnounced
    | BatchAnnounced
    | ShardMade
    | DoubtsChecked
    | ShardFailed
    | RecallAnswered
    | AttemptEnded
    | ShardCommitted
    | StorageChecked
)
