"""What cards cost: the arithmetic of prices, and the words for sums of money."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gaudi_batch.config.schema import JobConfig


@dataclass(frozen=True)
class Price:
    """What an hour of a card, or of a node with cards of the run, costs."""

    per_hour: float
    """In the job's currency, whichever that is."""
    unit: Literal["card", "node"]
    """What it is the price of."""

    @classmethod
    def of(cls, config: JobConfig) -> Price | None:
        """The price that a job names; None if it names none."""
        if config.price_per_card_hour is not None:
            return cls(config.price_per_card_hour, "card")
        if config.price_per_node_hour is not None:
            return cls(config.price_per_node_hour, "node")
        return None

    def cost(self, card_s: float | None, node_s: float | None) -> float | None:
        """The cost of a time; None if that is not known.

        Args:
            card_s: seconds of cards, each card counted by itself.
            node_s: seconds of nodes, each node counted by itself.
        """
        seconds = card_s if self.unit == "card" else node_s
        return None if seconds is None else self.per_hour * seconds / 3600

    def __str__(self) -> str:
        return f"{money(self.per_hour)} a {self.unit}-hour"


def money(amount: float) -> str:
    """A sum of money with two digits behind the point, or as many as show two digits of a small one."""
    digits = 2 if amount == 0 else max(2, 1 - math.floor(math.log10(abs(amount))))
    return f"{amount:.{min(digits, 12)}f}"


def cost_words(cost: float | None, expected: float | None) -> str:
    """What a run has cost and is expected to, as `cost 1.50 of about 12.00`; empty if the cost is not known.

    Args:
        cost: so far.
        expected: at the end; None while it is not known.
    """
    if cost is None:
        return ""
    return f"cost {money(cost)}" if expected is None else f"cost {money(cost)} of about {money(expected)}"
