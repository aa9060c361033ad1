"""What a run has come to: commits added up card by card, and summary.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gaudi_batch.manifest import CommitFacts
from gaudi_batch.throughput import Sums, rounded


@dataclass
class CardTally:
    """One card's commits."""

    node: str
    module: int | None
    shards: int = 0
    failed_rows: int = 0
    sums: Sums = field(default_factory=Sums)
    at_work: list[tuple[float, float]] = field(default_factory=list)
    """From when to when it was at each of them, waiting included, in seconds since the epoch by the driver's clock."""


class Tally:
    """The commits of a run, added up. Built from the manifests alone, so it agrees with them."""

    def __init__(self) -> None:
        self.attempts: dict[int, str] = {}
        """The committed attempt of each shard."""
        self.rows = 0
        self.failed_rows = 0
        self._images_again = 0
        self.cards: dict[str, CardTally] = {}

    def emptied(self) -> Tally:
        """A tally of no commits that knows of the same cards."""
        other = Tally()
        for name, card in self.cards.items():
            other.card(name, card.node, card.module)
        return other

    def add(self, facts: CommitFacts, finished_at: float | None = None) -> None:
        """Adds one commit; the same shard again changes nothing.

        Args:
            facts: of the commit.
            finished_at: when its last image was stored, in seconds since the epoch. Without it the commit counts in all
                but the rate of all cards.
        """
        if facts.shard in self.attempts:
            return
        self.attempts[facts.shard] = facts.attempt
        self.failed_rows += facts.failed_rows - facts.failed_before
        self._images_again += facts.images_before
        if not facts.again:
            self.rows += facts.rows
        card = self.card(facts.card, facts.node, facts.module)
        card.shards += 1
        card.failed_rows += facts.failed_rows
        card.sums += facts.sums
        if finished_at is not None:
            spent = facts.sums.steady_s + facts.sums.warmup_s + facts.sums.wait_s
            card.at_work.append((finished_at - spent, finished_at))

    def card(self, name: str, node: str, module: int | None) -> CardTally:
        """A card's own tally; one that has committed nothing counts, too."""
        return self.cards.setdefault(name, CardTally(node, module))

    @property
    def images(self) -> int:
        """Images of all commits, those that had to be made again counted once."""
        return sum(card.sums.images for card in self.cards.values()) - self._images_again

    @property
    def images_per_s(self) -> float | None:
        """Images a second of generation, warm-up and waiting left out, of the cards that were at work at one time: the
        sum of their own rates, averaged over the time in which any was at work. Five cards of 1 image/s make 5 beside
        each other and 1 after each other. None before the first steady batch."""
        rated = [(card.sums.images_per_s, card.at_work) for card in self.cards.values()]
        known = [(rate, at_work) for rate, at_work in rated if rate is not None]
        together = _length([stretch for _, at_work in known for stretch in at_work])
        return sum(rate * _length(at_work) for rate, at_work in known) / together if together > 0 else None

    def describe(self, faults: Mapping[str, int], retries: int) -> dict[str, Any]:
        """Totals and cards as summary.json has them.

        Args:
            faults: failures of each card that this driver saw.
            retries: shards that this driver had tried again.
        """
        faults = Counter(faults)
        cards = {
            name: {
                "node": card.node,
                "module": card.module,
                "shards": card.shards,
                "failed_rows": card.failed_rows,
                "faults": faults[name],
                **card.sums.describe(),
            }
            for name, card in sorted(self.cards.items())
        }
        total = sum((card.sums for card in self.cards.values()), Sums())
        return {
            "rows": self.rows,
            "failed_rows": self.failed_rows,
            "shards": len(self.attempts),
            "retries": retries,
            **(total.describe() | {"images": self.images, "images_per_s": rounded(self.images_per_s)}),
            "cards": cards,
        }


def _length(stretches: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in at least one stretch."""
    length, until = 0.0, -math.inf
    for start, stop in sorted(stretches):
        length += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return length
