"""How long shards take, by what cards have shown. Pure, a part of the schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from gaudi_batch.plan import BatchKind, Shard


@dataclass
class _Rate:
    seconds: float = 0.0
    batches: int = 0

    def add(self, seconds: float, batches: int) -> None:
        self.seconds += seconds
        self.batches += batches


@dataclass
class Pace:
    """What the shards that this driver has seen made have taken. It counts batches: a short one takes as long as a full
    one."""

    batch_size: int
    _rates: dict[tuple[BatchKind, bool], _Rate] = field(default_factory=dict)
    _own: dict[int, dict[BatchKind, _Rate]] = field(default_factory=dict)  # of each card, without captures

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
        is_new = (kind, captured) not in self._rates
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
        own = None if captures else self._own.get(card, {}).get(kind)
        rate = own or self._rates.get((kind, captures)) or self._rates.get((kind, True))
        return rate.seconds / rate.batches * self._batches(shard) if rate else None

    def _batches(self, shard: Shard) -> int:
        return max(1, -(-shard.images // self.batch_size))
