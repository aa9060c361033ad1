"""What several failures together say of storage, a time limit, a card or nodes. Pure, a part of the schedule."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field

from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.cards import Card, Cards
from gaudi_batch.scheduling.events import SlowBatch

MIN_STORAGE_NODES = 2
"""Storage counts as gone once it has failed for all nodes, if these are at least so many."""
MAX_CUTS = 2
"""A kind of batch is set aside once so many batches of it have passed their limit and no card has made one."""
MAX_FRUITLESS_NODES = 8
"""No node is expected to do better once so many were lost one after the other with nothing made between."""
CHANCE = 1e-6
"""A card is bad if the chance that it has so many more transient failures than the others is below this."""


@dataclass
class StorageFailures:
    """The nodes for which storage has failed since a card last stored a shard.

    It is gone when it fails for the driver, too, or for every node that has cards, if these are at least two: what one
    node can't do, another may.
    """

    being_checked: bool = False
    """Whether the driver is checking storage itself."""
    _nodes: set[str] = field(default_factory=set)

    def failed(self, node: str, live_nodes: Set[str]) -> bool:
        """Notes that storage failed for a card of a node; returns whether it is gone.

        Args:
            node: the node.
            live_nodes: the nodes of all cards that are ready or starting.
        """
        self._nodes.add(node)
        return len(self._nodes) >= MIN_STORAGE_NODES and live_nodes <= self._nodes

    def works(self) -> None:
        """Notes that a card has stored a shard."""
        self._nodes.clear()


@dataclass
class SlowKinds:
    """Kinds of batches that no card makes in time. That is the job's mistake, and no row's or card's.

    Cards of two nodes must have been killed at one, of which one makes other batches, as some hang at whatever they are
    given; or all cards that there are, twice. Where all are on one node, two of its cards are enough.
    """

    set_aside: dict[BatchKind, str] = field(default_factory=dict)
    """Kinds of batch that are not tried any more, with the reasons."""
    _cut: dict[BatchKind, list[Card]] = field(default_factory=dict)

    def cut(self, card: Card, slow: SlowBatch, cards: Cards) -> bool:
        """Notes that a card was killed at a batch of a kind that no card has made; returns whether the kind is now set
        aside.

        Args:
            card: the card.
            slow: what it was at.
            cards: all cards.
        """
        killed = self._cut.setdefault(slow.kind, [])
        killed.append(card)
        numbers = {card.number for card in killed}
        nodes = {card.node for card in killed}
        places = numbers if cards.live_on.keys() <= nodes else nodes
        several = len(places) >= MAX_CUTS and any(card.has_made for card in killed)
        if not several and (len(killed) < MAX_CUTS or cards.others(numbers)):
            return False
        self.set_aside[slow.kind] = f"batches of {slow.kind} take longer than {slow.limit}"
        return True


@dataclass
class TransientFailures:
    """Images and calls that failed and worked when repeated on the same card. The model may cause some on every card; a
    card that has far more than the others is bad."""

    _images: int = 0
    _failures: int = 0

    def add(self, card: Card, images: int, failures: int) -> None:
        """Notes that a card has made so many images, with so many failures among them."""
        card.images += images
        card.transient_failures += failures
        self._images += images
        self._failures += failures

    def verdict(self, card: Card, cards: int) -> str | None:
        """Why a card is bad, or None.

        Args:
            card: the card.
            cards: how many there are; among many one has more than the others by chance.
        """
        other_images, other_failures = self._images - card.images, self._failures - card.transient_failures
        if not other_images or not card.images:
            return None
        expected = (other_failures + 1) / other_images * card.images
        if _at_least(card.transient_failures, expected) >= CHANCE / cards:
            return None
        failures = f"{card.transient_failures} times in {card.images} images it failed at what worked when made again"
        return f"{failures}; the others did {other_failures} times in {other_images}"


def _at_least(count: int, expected: float) -> float:
    """The chance of at least so many events where so many are expected: the tail of a Poisson distribution."""
    if count <= expected:
        return 1.0
    term = math.exp(count * math.log(expected) - expected - math.lgamma(count + 1))
    total, number = 0.0, count
    while term > total * 1e-12:
        total += term
        number += 1
        term *= expected / number
    return total


@dataclass
class NodeLosses:
    """Nodes that were lost one after the other before a card of theirs had made anything: they die of loading the
    model, or live too shortly."""

    fruitless: int = 0

    def started(self, card: Card) -> None:
        """Notes that a card is being started."""
        card.fruitless_nodes = self.fruitless

    def lost(self, card: Card) -> None:
        """Notes that a card's node went without notice. Nodes that go at the same time count once."""
        if not card.has_made and card.fruitless_nodes == self.fruitless:
            self.fruitless += 1

    def made(self) -> None:
        """Notes that a card has made something."""
        self.fruitless = 0

    @property
    def hopeless(self) -> bool:
        """Whether no node is expected to do better."""
        return self.fruitless >= MAX_FRUITLESS_NODES
