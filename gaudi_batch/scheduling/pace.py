"""How long shards take, by what cards have shown. Pure, a part of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gaudi_batch.plan import BatchKind, Shard

BATCHES_OF_CAPTURE = 3
"""First batches of a graph key that count as warm-up, at most."""


class BatchTimes(NamedTuple):
    """What batches of one kind have taken, in seconds."""

    steady_s: float
    steady: int
    """How many batches that is."""
    warmup_s: float
    """Of the first batches of a graph key on a card."""
    warmup: int


@dataclass
class _Rate:
    seconds: float = 0.0
    batches: int = 0
    shards: int = 0

    def add(self, seconds: float, batches: int) -> None:
        self.seconds += seconds
        self.batches += batches
        self.shards += 1

    @property
    def batch_s(self) -> float:
        return self.seconds / self.batches


class Pace:
    """What shards have taken. It counts batches: a short one takes as long as a full one.

    Args:
        batch_size: images of one pipeline call.
        known: what earlier drivers' batches have taken, by kind; counts until this one has seen a shard of the kind.
    """

    def __init__(self, batch_size: int, known: Mapping[BatchKind, BatchTimes] | None = None) -> None:
        self.batch_size = batch_size
        self._rates: dict[tuple[BatchKind, bool], _Rate] = {}
        self._own: dict[int, dict[BatchKind, _Rate]] = {}  # of each card, without captures
        self._known: dict[tuple[BatchKind, bool], _Rate] = {}
        for kind, times in (known or {}).items():
            if times.steady and times.steady_s > 0:
                self._known[kind, False] = _Rate(times.steady_s, times.steady, 1)
            if times.warmup and times.warmup_s > 0:
                # How many captures these were is not recorded; the fewest are taken, so that one is not thought cheap.
                captures = -(-times.warmup // BATCHES_OF_CAPTURE)
                self._known[kind, True] = _Rate(times.warmup_s, times.warmup, captures)

    def took(self, card: int, shard: Shard, seconds: float, captured: bool) -> bool:
        """Notes how long the pipeline calls of a shard took; returns whether nothing was known of its kind before.

        Args:
            card: the card that made it.
            shard: the shard.
            seconds: how long.
            captured: whether the card captured a graph for it.
        """
        if seconds <= 0:
            return False  # none of its rows could be run
        kind = shard.bucket.batch_kind
        is_new = self._rate(kind, captured) is None
        self._rates.setdefault((kind, captured), _Rate()).add(seconds, self._batches(shard))
        if not captured:
            self._own.setdefault(card, {}).setdefault(kind, _Rate()).add(seconds, self._batches(shard))
        return is_new

    def forget(self, card: int) -> None:
        """Forgets how fast a card is, since it gets another process."""
        self._own.pop(card, None)

    def expected_s(self, card: int, shard: Shard, captures: bool) -> float | None:
        """Seconds that a shard should take on a card; None while that is not known.

        Args:
            card: the card.
            shard: the shard.
            captures: whether the card has to capture its graph.
        """
        kind = shard.bucket.batch_kind
        warm, cold = self._rate(kind, False), self._rate(kind, True)
        if captures:
            return self._with_capture_s(shard, warm, cold) if cold else None
        rate = self._own.get(card, {}).get(kind) or warm or cold
        return rate.batch_s * self._batches(shard) if rate else None

    def _rate(self, kind: BatchKind, captured: bool) -> _Rate | None:
        return self._rates.get((kind, captured)) or self._known.get((kind, captured))

    def _with_capture_s(self, shard: Shard, warm: _Rate | None, cold: _Rate) -> float:
        """A capture takes as long for a small shard as for a large one."""
        batch_s = min(warm.batch_s, cold.batch_s) if warm else 0.0
        return (cold.seconds - batch_s * cold.batches) / cold.shards + batch_s * self._batches(shard)

    def _batches(self, shard: Shard) -> int:
        return max(1, -(-shard.images // self.batch_size))
