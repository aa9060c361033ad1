"""What the driver and a card say to each other: plain data that Ray carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gaudi_batch.job import Job
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.events import (
    BatchAnnounced,
    DoubtsChecked,
    ReadingAnnounced,
    ShardBegun,
    ShardFailed,
    ShardOutcome,
)
from gaudi_batch.storage.store import Storage


@dataclass(frozen=True)
class CardSetup:
    """All that a card needs to know of a job."""

    job: Job
    """With its device resolved."""
    storage: Storage
    """The output, as the driver has opened it."""
    run_id: str
    """That of its run.json, by which a card knows that it sees the same output."""


@dataclass(frozen=True)
class Ready:
    """The pipeline is loaded."""

    node_id: str
    node: str
    """The node's host name."""
    module: int | None
    """The module that Ray pinned; None where the device has none."""
    pid: int
    load_s: float
    stack: Mapping[str, str]
    """What shapes its images, by name; see stack.py."""
    model: str
    """The model that it has loaded: the commit of a hub model, the SHA-256 of a directory's files."""
    threads: int | None
    """Of torch in its process; None where there is no torch."""
    cpus: int
    """How many its process may use."""
    notes: tuple[str, ...] = ()
    """What a person should know of its device and versions."""


@dataclass(frozen=True)
class Broken:
    """The pipeline could not be loaded, or the device has failed: this process is to be replaced."""

    error: str
    storage: bool = False
    """Whether it was storage that went on failing, which says nothing of the card."""


@dataclass(frozen=True)
class Done:
    """A shard is made."""

    attempt: str
    manifest: bytes
    """Ready to be put in place as it is."""
    facts: CommitInfo
    outcome: ShardOutcome


Message: TypeAlias = (
    Ready | Broken | Done | ShardBegun | ReadingAnnounced | BatchAnnounced | DoubtsChecked | ShardFailed
)
"""What a card tells the driver. Those of an announcement wait until it is acknowledged."""


@dataclass(frozen=True)
class CardStatus:
    """What a card is doing."""

    phase: str
    """loading, idle, first batch, or batch."""
    phase_s: float
    """Seconds since that began."""
    storage_s: float
    """Seconds for which its oldest operation on storage has been going on."""
    images: int
    """Images in storage of shards that are not done yet."""
    kind: BatchKind | None = None
    """The kind of the batch that it is at."""
    reading_s: float = 0.0
    """Seconds for which it has been reading the rows of a shard."""
    batch_s: Mapping[BatchKind, float] = field(default_factory=dict)
    """The longest batch so far of each kind, the first batches of its graph key left out."""
    warmup_s: Mapping[BatchKind, float] = field(default_factory=dict)
    """The shortest of these first batches."""
    shard: int | None = None
    """That of the batch."""
    rows: tuple[int, ...] = ()
    """Of the batch, over all files."""
    reading_shard: int | None = None
    """Whose rows it is reading."""
    storing: int = 0
    """Images that are made and not yet in storage."""
    storing_s: float = 0.0
    """Seconds since one of these was made or stored last."""


@dataclass(frozen=True)
class CardReport:
    """A card's answer: what has happened since what was acknowledged, numbered, and what it is doing."""

    events: tuple[tuple[int, Message], ...]
    status: CardStatus
