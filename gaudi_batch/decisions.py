"""What the schedule decides and the driver carries out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gaudi_batch.plan import Shard


@dataclass(frozen=True)
class Assign:
    """Send a shard to a card."""

    card: int
    shard: Shard
    attempt: str
    announce: bool = False
    """Announce each batch, and wait for the acknowledgement, before its call."""
    alone: frozenset[int] = frozenset()
    """Rows to run one at a time."""
    accused: Mapping[int, str] = field(default_factory=dict)
    """Rows that raised alone on another card, with the error; raising alone once more makes them failed rows."""
    condemned: Mapping[int, str] = field(default_factory=dict)
    """Rows to record as failed, with the error, without a try."""


@dataclass(frozen=True)
class Recall:
    """Ask a card to give back a shard if it has not begun it."""

    card: int
    attempt: str


@dataclass(frozen=True)
class Commit:
    """Put the manifest of this attempt."""

    shard: int
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
    """Kill the card's process and give its slot back: its node leaves, and it has nothing in hand."""

    card: int


@dataclass(frozen=True)
class Finish:
    """The run is over; `reason` is None when every shard is committed."""

    reason: str | None


Decision: TypeAlias = Assign | Recall | Commit | Replace | Quarantine | Release | Finish
