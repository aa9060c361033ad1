"""What the schedule decides and the driver carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gaudi_batch.plan import Shard


@dataclass(frozen=True)
class ShardTask:
    """One attempt at a shard, with what earlier attempts have shown of its rows."""

    shard: Shard
    attempt: str
    announce: bool = False
    """Announce each reading and each batch, and wait for the acknowledgement, before it begins."""
    alone: frozenset[int] = frozenset()
    """Rows to run one at a time."""
    failed_alone_once: Mapping[int, str] = field(default_factory=dict)
    """Rows that failed alone on another card, with their errors; one that fails alone again is a failed row."""
    fail_without_running: Mapping[int, str] = field(default_factory=dict)
    """Rows to record as failed, with these errors, without running them."""
    by_row: frozenset[int] = frozenset()
    """Row groups to decode a few rows at a time."""
    unreadable: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    """Of such groups, the first row, counted over all files, that is not to be decoded any more, with the reason."""
    undecoded: Mapping[int, str] = field(default_factory=dict)
    """Row groups that another card could not decode; if this one can't either, their rows fail."""
    confirm: frozenset[int] = frozenset()
    """If not empty: make these rows alone, one at a time, and report which of them fail; store nothing."""
    backup_of: str | None = None
    """The attempt at the same shard that goes on elsewhere, if this is a second one."""


@dataclass(frozen=True)
class AskForCards:
    """Ask the cluster for a place for each of these new cards."""

    cards: tuple[int, ...]


@dataclass(frozen=True)
class DropCards:
    """Take back the request for the place of each of these cards, which the cluster has not given."""

    cards: tuple[int, ...]


@dataclass(frozen=True)
class UseStack:
    """From now on this stack makes the run's images: write it down before the next manifest."""

    stack: Mapping[str, str]
    node: str
    """Host name of a node that has it."""


@dataclass(frozen=True)
class Admit:
    """A card that has loaded begins to work."""

    card: int


@dataclass(frozen=True)
class HoldBack:
    """A card that has loaded waits, since its images would differ from those of other cards."""

    card: int
    reason: str


@dataclass(frozen=True)
class NoteFault:
    """Count a fault that the schedule itself has found in a card."""

    card: int
    error: str
    quiet: bool = False
    """Whether the log has the same from another decision."""


@dataclass(frozen=True)
class Assign:
    """Send a shard to a card."""

    card: int
    task: ShardTask


@dataclass(frozen=True)
class Recall:
    """Ask a card to give back a shard if it has not begun it."""

    card: int
    attempt: str


@dataclass(frozen=True)
class Drop:
    """Tell a card to end an attempt that another has overtaken; it says when it has."""

    card: int
    attempt: str


@dataclass(frozen=True)
class Commit:
    """Put the manifest of this attempt."""

    shard: int
    attempt: str


@dataclass(frozen=True)
class Discard:
    """Drop the manifest of this attempt: its card was wrong about a row, and the shard is made again."""

    attempt: str


@dataclass(frozen=True)
class Replace:
    """Kill what is left of the card's process and start another in its place."""

    card: int


@dataclass(frozen=True)
class Quarantine:
    """Kill the card's process, start none, and hold its slot so that nothing else lands on it."""

    card: int
    reason: str


@dataclass(frozen=True)
class Release:
    """Kill the card's process and give back its slot: it has nothing in flight; its node leaves, or the run stops."""

    card: int


@dataclass(frozen=True)
class GiveBack:
    """Give back the place of a card whose node is gone."""

    card: int


@dataclass(frozen=True)
class CheckStorage:
    """Check whether storage fails for the driver, too: write to the output, and read the file of this shard."""

    shard: Shard


@dataclass(frozen=True)
class Finish:
    """The run is over; `reason` is None when every shard is committed."""

    reason: str | None


Decision: TypeAlias = (
    AskForCards
    | DropCards
    | UseStack
    | Admit
    | HoldBack
    | NoteFault
    | Assign
    | Recall
    | Drop
    | Commit
    | Discard
    | Replace
    | Quarantine
    | Release
    | GiveBack
    | CheckStorage
    | Finish
)
