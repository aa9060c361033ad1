"""What a job is expected to cost, and whether its budget and its deadline leave room for that, as `check` says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gaudi_batch.driver.spending import Spending
from gaudi_batch.output.cost import Price, money
from gaudi_batch.output.spans import Held
from gaudi_batch.text import counted, duration

CARDS_OF_NODE = 8
"""Cards of a Gaudi node: what is assumed where nothing says how many there will be."""


@dataclass(frozen=True)
class Work:
    """What a job has left to do."""

    card_s: float | None
    """Seconds of one card for all of it; None if nothing has measured that."""
    cards: int | None
    """Cards that it has work for; None if nobody knows how many there will be."""
    is_whole: bool = True
    """Whether that is all of it; else a part is left out, as nothing has measured it."""
    held: int | None = None
    """Cards that it holds to its end, those without work among them; None if nobody knows."""

    @property
    def seconds(self) -> float | None:
        """How long all of them take; None if that is not known."""
        return None if self.card_s is None or not self.cards else self.card_s / self.cards


def money_lines(work: Work, spending: Spending, used: dict[str, Any]) -> list[str]:
    """The cost of a job, and a warning where its budget or its deadline would stop it.

    Args:
        work: what is left to do.
        spending: what it has cost and may cost.
        used: cards of its run, as summary.json has them; empty if it has none.
    """
    lines = []
    if spending.price is not None:
        rest, basis = _rest(work, spending.price, used)
        so_far = spending.cost(Held())
        about = "about" if work.is_whole else "more than"
        parts = ["not known, as the time is not" if rest is None else f"{about} {money(rest)} ({basis})"]
        if so_far is None:
            parts.append("what it has cost so far is not known")
        elif so_far:
            in_all = "" if rest is None else f", {about} {money(so_far + rest)} in all"
            parts.append(f"{money(so_far)} so far{in_all}")
        lines.append(f"cost     {'; '.join(parts)}")
        lines += _budget(spending.budget, spending.spent(Held()), rest)
    left = spending.seconds_left
    if left is not None and left <= 0 and work.card_s != 0:
        lines.append("deadline is over: the run would stop at once")
    elif left is not None and work.seconds is not None and work.seconds > max(0, left):
        lines.append(
            f"deadline is in {duration(left)}, and the rest takes about {duration(work.seconds)}: the run would stop"
            " before its end"
        )
    return lines


def _rest(work: Work, price: Price, used: dict[str, Any]) -> tuple[float | None, str]:
    """What the rest costs, and what that goes by."""
    basis, card_s = f"at {price}, loading and warm-up left out", work.card_s
    if card_s is None:
        return None, basis
    nodes = {card.get("node") for card in used.values()}
    cards_of_node = math.ceil(len(used) / len(nodes)) if nodes else CARDS_OF_NODE
    cards = work.cards or cards_of_node
    held = max(cards, work.held or 0)
    count = math.ceil(held / cards_of_node)
    seconds = card_s / cards
    if price.unit == "node":
        basis = f"at {price}, {counted(count, 'node')} of {cards_of_node} cards, loading and warm-up left out"
    if held > cards:
        basis += f", {counted(held - cards, 'card')} without work paid, too"
    return price.cost(seconds * held, seconds * count), basis


def _budget(budget: float | None, so_far: float, rest: float | None) -> list[str]:
    if budget is None or rest == 0:
        return []
    if so_far >= budget:
        return [f"budget   {budget:.15g} is used up: the run would stop at once"]
    if rest is not None and so_far + rest > budget:
        return [f"budget   {budget:.15g} is less than that: the run would stop before its end"]
    return []
