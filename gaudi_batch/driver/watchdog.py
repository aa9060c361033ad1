"""The limits that tell when a card has been at one thing for too long, so that nothing hangs."""

from __future__ import annotations

from dataclasses import dataclass, field

from gaudi_batch.card.messages import CardStatus
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.events import SlowBatch, SlowReading, StorageStalled

BATCH_LIMIT_FACTOR = 10
STORAGE_GRACE_S = 60.0
"""Seconds beyond the job's `storage_patience` that one operation on storage may take."""


@dataclass(frozen=True)
class PassedLimit:
    """A card has passed a limit."""

    reason: str
    slow: SlowBatch | SlowReading | StorageStalled | None = None
    """What it was at, if that can be slow everywhere: storage, a reading, or a batch of a kind that no card has made
    yet."""


@dataclass
class BatchTimes:
    """How long batches take, by their kind, as the cards of a run report it."""

    _longest: dict[BatchKind, float] = field(default_factory=dict)
    _warmup: dict[BatchKind, float] = field(default_factory=dict)
    loading: float | None = None
    """The longest time that a card took to load, in seconds; None before one has loaded."""

    def loaded(self, seconds: float) -> None:
        """Notes that a card has loaded in so many seconds."""
        self.loading = max(seconds, self.loading or 0.0)

    def learn(self, status: CardStatus) -> None:
        """Takes in what a card reports."""
        for kind, seconds in status.batch_s.items():
            self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))
        for kind, seconds in status.warmup_s.items():
            self._warmup[kind] = min(seconds, self._warmup.get(kind, seconds))

    def of(self, kind: BatchKind | None) -> float | None:
        """Seconds of the longest batch of a kind; before there is one, those of the shortest that compiled; None before
        any."""
        return self._longest.get(kind, self._warmup.get(kind)) if kind is not None else None

    def usual(self, phase: str, kind: BatchKind | None) -> float | None:
        """Usual seconds of a batch of a kind, first batches and later ones by themselves; None before any."""
        known = self._warmup if phase == "first batch" else self._longest
        return known.get(kind) if kind is not None else None


@dataclass
class PhaseRules:
    """What decides whether a card has been at something for too long."""

    config: JobConfig
    need: str
    """What a card takes of the cluster, as `1 HPU`."""
    poll_s: float
    """Seconds after which a card with nothing to report answers."""
    times: BatchTimes = field(default_factory=BatchTimes)
    """How long things have taken so far."""


def phase_limit(status: CardStatus | None, config: JobConfig, times: BatchTimes) -> tuple[str, float]:
    """The limit of what a card's device does: its name in `limits`, and seconds."""
    limits = config.limits
    phase = status.phase if status else "loading"
    seen = times.of(status.kind if status else None)
    if phase == "loading":
        return "loading", limits.loading
    if phase == "batch" and seen is not None:
        return "batch", max(limits.batch, BATCH_LIMIT_FACTOR * seen)
    return "first_batch", limits.first_batch


def storage_limit(config: JobConfig) -> float:
    """Seconds that one operation on storage may take on a card."""
    return config.storage_patience + STORAGE_GRACE_S


def reading_limit(config: JobConfig) -> float:
    """Seconds that reading the rows of a shard may take."""
    return config.limits.loading + config.storage_patience


def passed_limit(status: CardStatus | None, since_seen: float, rules: PhaseRules) -> PassedLimit | None:
    """The limit that a card has passed, or None.

    Args:
        status: its last answer; None before the first, which comes when it has loaded.
        since_seen: seconds since then.
        rules: the limits.
    """
    config, times = rules.config, rules.times
    limits = config.limits
    phase, seconds = (status.phase, status.phase_s + since_seen) if status else ("loading", since_seen)
    if status and status.storage_s > storage_limit(config):
        return PassedLimit(f"an operation on storage has not ended for {status.storage_s:.0f} s", StorageStalled())
    if status and status.reading_s > reading_limit(config):
        reason = f"it has been reading the rows of a shard for {status.reading_s:.0f} s (limits.loading)"
        return PassedLimit(reason, SlowReading())
    if phase == "idle":
        silent = since_seen > rules.poll_s + limits.answer
        return PassedLimit(f"it has not answered for {since_seen:.0f} s (limits.answer)") if silent else None
    kind = status.kind if status else None
    seen = times.of(kind)
    name, limit = phase_limit(status, config, times)
    if seconds <= limit:
        return None
    slow = SlowBatch(kind, f"{limit:g} s (limits.{name})") if kind is not None and seen is None else None
    return PassedLimit(f"its {phase} took longer than {limit:g} s (limits.{name})", slow)
