"""What a run has come to: commits added up card by card, and summary.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gaudi_batch.manifest import CommitFacts
from gaudi_batch.throughput import Sums


@dataclass
class CardTally:
    """One card's commits."""

    node: str
    module: int | None
    shards: int = 0
    failed_rows: int = 0
    sums: Sums = field(default_factory=Sums)


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

    def add(self, facts: CommitFacts) -> None:
        """Adds one commit; the same shard again changes nothing."""
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

    def card(self, name: str, node: str, module: int | None) -> CardTally:
        """A card's own tally; one that has committed nothing counts, too."""
        return self.cards.setdefault(name, CardTally(node, module))

    @property
    def images(self) -> int:
        """Images of all commits, those that had to be made again counted once."""
        return sum(card.sums.images for card in self.cards.values()) - self._images_again

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
        rates = [card.sums.images_per_s for card in self.cards.values() if card.sums.images_per_s is not None]
        total = sum((card.sums for card in self.cards.values()), Sums())
        return {
            "rows": self.rows,
            "failed_rows": self.failed_rows,
            "shards": len(self.attempts),
            "retries": retries,
            # Of all cards together: the sum of their rates.
            **(total.describe() | {"images": self.images, "images_per_s": round(sum(rates), 4) if rates else None}),
            "cards": cards,
        }
