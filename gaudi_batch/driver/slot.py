"""One card's place in the cluster: where it is, and what became of its process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gaudi_batch.card.messages import CardStatus, Ready
from gaudi_batch.driver.watchdog import PassedLimit


@dataclass
class Slot:
    """One card's place in the cluster, for the life of the job."""

    number: int
    node_id: str = ""
    """The Ray node on which the cluster has placed it; empty before."""
    name: str = ""
    ready: Ready | None = None
    """What the last process that loaded said of itself."""
    up: bool = False
    """Whether that is the present process, and it lives; it works, or waits for what the others say."""
    actor: Any = None
    """The Ray actor of the present process; None between two."""
    status: CardStatus | None = None
    last_seen: float = 0.0
    """When it last answered, monotonic."""
    passed: PassedLimit | None = None
    """The limit for which its process is being killed."""
    assigning: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Has shards reach the process in the order in which they were sent: its threads take calls side by side."""
    starting: asyncio.Task[None] | None = None
    """What has its process started, while Ray does that."""
    since: float = field(default_factory=time.monotonic)
    """When it was asked for, monotonic."""
    placed: float | None = None
    """When the cluster gave it its card, monotonic."""
    given_back: float | None = None
    """When that was given back, or was lost with its node."""

    def card_s(self, now: float) -> float:
        """Seconds for which it has held a card, by `now`, monotonic."""
        until = now if self.given_back is None else self.given_back
        return 0.0 if self.placed is None else until - self.placed

    @property
    def label(self) -> str:
        """What the card is called in the records; a number until it is up."""
        return self.name or str(self.number)

    @property
    def where(self) -> str:
        """The card as a person finds it."""
        if self.ready is None:
            return f"card {self.number}"
        module = "" if self.ready.module is None else f", module {self.ready.module}"
        return f"card {self.name} (node {self.ready.node}{module})"


def card_name(slot: Slot, ready: Ready, slots: Iterable[Slot]) -> str:
    """What a card is called: after its place, so that its records mean the same card in the next run, too.

    Args:
        slot: its slot.
        ready: what its process says of itself.
        slots: of all cards.
    """
    name = f"{ready.node}-{slot.number if ready.module is None else ready.module}"
    if any(other.name == name for other in slots if other is not slot):
        # Two Ray nodes of one host, or a node that came back under its name.
        name = f"{name}-{ready.node_id[-6:]}"
    return name
