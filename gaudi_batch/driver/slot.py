"""One card's place in the cluster, and its process there."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gaudi_batch.card.messages import CardStatus, Ready
from gaudi_batch.driver.watchdog import PassedLimit
from gaudi_batch.output.spans import Held
from gaudi_batch.output.totals import length_of_union


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
    """Whether the present process has loaded and lives; it then works, or waits for other cards."""
    actor: Any = None
    """The Ray actor of the present process; None between two processes."""
    status: CardStatus | None = None
    last_seen: float = 0.0
    """When it last answered, monotonic."""
    passed: PassedLimit | None = None
    """The limit for which its process is being killed."""
    assigning: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a shard is sent: the process takes calls in several threads, and shards must arrive in their order."""
    starting: asyncio.Task[None] | None = None
    """The task that starts the process, while it does."""
    since: float = field(default_factory=time.monotonic)
    """When the card was asked for, monotonic."""
    placed: float | None = None
    """When the cluster gave the card, monotonic."""
    given_back: float | None = None
    """When the place was given back or lost with its node, monotonic; None before."""

    def forget_process(self) -> None:
        """Forgets what the last process said; another is about to be started."""
        self.status = self.passed = None
        self.up = False
        self.last_seen = time.monotonic()

    def card_s(self, now: float) -> float:
        """Seconds for which the slot has held a card by `now`, monotonic."""
        until = now if self.given_back is None else self.given_back
        return 0.0 if self.placed is None else until - self.placed

    @property
    def label(self) -> str:
        """The card's name in the records; a number until its process has loaded."""
        return self.name or str(self.number)

    @property
    def where(self) -> str:
        """Where a person finds the card."""
        if self.ready is None:
            return f"card {self.number}"
        module = "" if self.ready.module is None else f", module {self.ready.module}"
        return f"card {self.name} (node {self.ready.node}{module})"


def held_of_cluster(slots: Iterable[Slot], now: float) -> Held:
    """What the slots of a run hold, and have held, of the cluster by `now`, monotonic."""
    cards, card_s = 0, 0.0
    stretches: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    nodes = set()
    for slot in slots:
        if slot.placed is not None:
            card_s += slot.card_s(now)
            stretches[slot.node_id].append((slot.placed, slot.placed + slot.card_s(now)))
            if slot.given_back is None:
                cards += 1
                nodes.add(slot.node_id)
    return Held(card_s, sum(map(length_of_union, stretches.values())), cards, len(nodes))


def card_name(slot: Slot, ready: Ready, slots: Iterable[Slot]) -> str:
    """The name of a card: after its node and module, so that records of the next run mean the same card.

    Args:
        slot: its slot.
        ready: what its process says of itself.
        slots: of all cards.
    """
    name = f"{ready.node}-{slot.number if ready.module is None else ready.module}"
    if any(other.name == name for other in slots if other is not slot):
        # Two Ray nodes on one host, or a node that came back under its name.
        name = f"{name}-{ready.node_id[-6:]}"
    return name
