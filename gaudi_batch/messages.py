"""What the driver and a card say to each other: plain data that Ray carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from gaudi_batch.config import JobConfig
from gaudi_batch.manifest import CommitFacts
from gaudi_batch.pipelines.model import ModelFacts
from gaudi_batch.plan import GraphKey
from gaudi_batch.prompts import PromptDataset
from gaudi_batch.rows import RowRules
from gaudi_batch.storage import Storage


@dataclass(frozen=True)
class CardSetup:
    """All that a card needs to know of a job."""

    config: JobConfig
    """With its device resolved."""
    storage: Storage
    """The output, as the driver has opened it."""
    run_id: str
    """That of its run.json, by which a card knows that it sees the same output."""
    model: ModelFacts
    dataset: PromptDataset
    rules: RowRules
    threads: int


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
    notes: tuple[str, ...] = ()
    """What a person should know of its device and versions."""


@dataclass(frozen=True)
class Broken:
    """The pipeline could not be loaded, or the device has failed: this process is to be replaced."""

    error: str
    storage: bool = False
    """Whether it was storage that went on failing, which says nothing of the card."""


@dataclass(frozen=True)
class Announced:
    """The card is about to call the pipeline for these rows, and waits for this to be acknowledged."""

    attempt: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    """A shard is made."""

    attempt: str
    manifest: bytes
    """Ready to be put in place as it is."""
    facts: CommitFacts
    raised_rows: int
    """Rows that failed in the pipeline."""


@dataclass(frozen=True)
class Failed:
    """A shard could not be made."""

    attempt: str
    error: str
    accused: Mapping[int, str] = field(default_factory=dict)
    """Rows that raised alone, with no other row made afterwards."""
    healthy: bool = True
    storage: bool = False
    """Whether it was storage that failed."""
    hopeless: bool = False
    """Whether no card could make it: the prompts are no longer those that were planned."""


Event: TypeAlias = Ready | Broken | Announced | Done | Failed


@dataclass(frozen=True)
class Status:
    """What a card is doing."""

    phase: str
    """loading, idle, first batch, or batch."""
    phase_s: float
    """Seconds since that began."""
    storage_s: float
    """Seconds for which its oldest operation on storage has been going on."""
    images: int
    """Images in storage of shards that are not done yet."""
    batch_s: Mapping[GraphKey, float]
    """The longest batch so far of each graph key, its first batches left out."""


@dataclass(frozen=True)
class News:
    """A card's answer: what has happened since what was acknowledged, numbered, and what it is doing."""

    events: tuple[tuple[int, Event], ...]
    status: Status
