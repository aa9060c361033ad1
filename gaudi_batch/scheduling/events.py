"""What happens in a run, as the schedule is told of it: plain data without Ray, storage or a clock."""

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
    """Failed rows that another card has to confirm, with their errors: images that came out wrong twice,
    or could not be encoded."""


@dataclass(frozen=True)
class ShardFailure:
    """Why a shard could not be made by a card whose process lives."""

    error: str
    failed_alone_once: Mapping[int, str] = field(default_factory=dict)
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


# -- the cluster ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capacity:
    """What the cluster has for a job."""

    cards: int
    """Cards that the job may have of it, held by others or not."""
    total_cards: int
    """All that it has, so also those that may take the place of failed ones."""
    nodes: frozenset[str]
    """Ids of the nodes that are up."""
    leaving: frozenset[str]
    """Ids of those that have announced their end."""


@dataclass(frozen=True)
class ClusterSeen:
    """The cluster was asked what it has."""

    capacity: Capacity
    now: float
    """Seconds, monotonic."""


@dataclass(frozen=True)
class RunFailed:
    """Something without which the run can't go on has failed for the driver: its storage, or Ray."""

    reason: str


@dataclass(frozen=True)
class StopRequested:
    """Somebody asked the run to stop: no more work is taken up, and what has begun is finished."""

    reason: str


@dataclass(frozen=True)
class StopForced:
    """The run is to end now, whatever has begun: the grace is over, a second signal came, or the lease is lost."""

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
    """What a card that has loaded its pipeline says of itself."""

    name: str
    """What it is called."""
    node_id: str
    """The node on which it is now; Ray may have moved its place."""
    node: str
    """The node's host name."""
    module: int | None
    """The module that Ray pinned; None where the device has none."""
    stack: Mapping[str, str]
    """What shapes its images, by name."""
    model: str
    """The commit or SHA-256 of the model that it has loaded."""
    cpus: int
    """How many its process may use."""


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
    slow: SlowBatch | SlowReading | StorageStalled | None = None
    """What it was killed for, if that says nothing of a row: storage that stalled, a reading that took too long, or a
    batch of a kind that no card has made."""


@dataclass(frozen=True)
class CardBroken:
    """A card's process says that it can't go on: it could not load its pipeline, or its device failed."""

    card: int
    error: str
    storage: bool = False
    """Whether storage went on failing while it loaded, which says little of the card."""


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
    """A card has made the doubted rows of a held record alone."""

    attempt: str
    failures: Mapping[int, str]
    """Those that failed on it, too, with their errors."""


@dataclass(frozen=True)
class ShardFailed:
    """A card could not make a shard, and its process lives."""

    attempt: str
    failure: ShardFailure


@dataclass(frozen=True)
class RecallAnswered:
    """A card has answered a recall."""

    attempt: str
    given_back: bool
    """Whether it had not begun the shard and gave it back."""


@dataclass(frozen=True)
class ShardCommitted:
    """The manifest of a shard is in place, from this driver or from another."""

    shard: int


@dataclass(frozen=True)
class StorageChecked:
    """The driver has looked at storage itself, as `CheckStorage` asked."""

    shard: int
    """The shard whose rows it has read."""
    error: str | None = None
    """How storage failed for it, if it did."""
    of_shard: str | None = None
    """How these rows alone failed, if they did: no card can make the shard."""


Event: TypeAlias = (
    ClusterSeen
    | RunFailed
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
    | ShardCommitted
    | StorageChecked
)
