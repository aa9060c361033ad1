"""Messages between the driver and a card: plain data that Ray carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gaudi_batch.card.readings import Readings
from gaudi_batch.card.work import CardWork
from gaudi_batch.job import Job
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.events import (
    BatchAnnounced,
    DoubtsChecked,
    LargeBatch,
    ReadingAnnounced,
    ShardBegun,
    ShardFailed,
    ShardOutcome,
)
from gaudi_batch.storage.store import Storage


@dataclass(frozen=True)
class CardSetup:
    """What a card needs to know of a job."""

    job: Job
    """The job, its device resolved."""
    storage: Storage
    """The output, as the driver has opened it."""
    run_id: str
    """The run id in run.json, by which a card checks that it sees the same output."""
    driver: str
    """The prefix of the driver's attempts, which lease.json has before there is a run.json."""
    tracker: Any = None
    """The actor that knows which cards have the model; None where each node has it, or nobody would ask."""


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
    """The versions and settings that shape its images, by name; see stack.py."""
    model: str
    """The model that it has loaded: the commit of a hub model, or the SHA-256 of a directory's files."""
    threads: int | None
    """Of torch in its process; None where there is no torch."""
    cpus: int
    """How many CPUs its process may use."""
    notes: tuple[str, ...] = ()
    """What a person should know of its device and versions."""


@dataclass(frozen=True)
class Broken:
    """The pipeline could not be loaded, or the device has failed: the process has to be replaced."""

    error: str
    storage: bool = False
    """Whether the cause was storage that kept failing, which says nothing of the card."""
    large: LargeBatch | None = None
    """The batch for which the device had no memory left, if that was the cause."""


@dataclass(frozen=True)
class Done:
    """A card has made a shard."""

    attempt: str
    manifest: bytes
    """The bytes of the manifest, as they are to be stored."""
    info: CommitInfo
    outcome: ShardOutcome


@dataclass(frozen=True)
class Dropped:
    """A card is done with an attempt that it was told to drop."""

    attempt: str


Message: TypeAlias = (
    Ready | Broken | Done | Dropped | ShardBegun | ReadingAnnounced | BatchAnnounced | DoubtsChecked | ShardFailed
)
"""What a card tells the driver. An announcement makes the card wait until it is acknowledged."""


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
    """The kind of the batch that it is making."""
    reading_s: float = 0.0
    """Seconds for which it has been reading a shard's rows."""
    batch_s: Mapping[BatchKind, float] = field(default_factory=dict)
    """Seconds of the longest batch so far of each kind, apart from the first batches of its graph key."""
    warmup_s: Mapping[BatchKind, float] = field(default_factory=dict)
    """Seconds of the shortest of these first batches."""
    shard: int | None = None
    """The shard of the batch."""
    rows: tuple[int, ...] = ()
    """Rows of the batch, counted over all files."""
    reading_shard: int | None = None
    """The shard whose rows it is reading."""
    storing: int = 0
    """Images that are made and not stored yet."""
    storing_s: float = 0.0
    """Seconds since an image was last made or stored."""
    work: CardWork = field(default_factory=CardWork)
    """What its process has done since it started."""
    readings: Readings = field(default_factory=Readings)
    """What its counters say now."""
    images_of: Mapping[str, int] = field(default_factory=dict)
    """The same images by attempt."""


@dataclass(frozen=True)
class CardReport:
    """A card's answer to a poll: the numbered events since the acknowledged one, and what the card is doing."""

    events: tuple[tuple[int, Message], ...]
    status: CardStatus
