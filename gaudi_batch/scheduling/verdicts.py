"""What several failures together say of storage, a time limit, a card or nodes. Pure, a part of the schedule."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, field

from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.cards import Card, Cards
from gaudi_batch.scheduling.events import LargeBatch, SlowBatch

MIN_STORAGE_NODES = 2
"""Storage counts as gone once it has failed for all nodes, if these are at least so many."""
MAX_BATCHES_LOST = 2
"""A kind of batch is set aside once so many cards have failed at it and none has made one."""
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
class UnmadeKinds:
    """Kinds of batches that no card makes in time, or for which no device has memory. That is the job's mistake, and no
    row's or card's.

    Cards of two nodes must have been killed at one that is slow, of which one makes other batches, as some hang at
    whatever they are given; or all cards that there are, twice. Where all are on one node, two of its cards are enough.
    For memory two cards are enough, wherever they are: the process of a card that ran out of it is a new one each time.
    """

    set_aside: dict[BatchKind, str] = field(default_factory=dict)
    """Kinds of batch that are not tried any more, with the reasons."""
    _made: set[BatchKind] = field(default_factory=set)
    _lost: dict[BatchKind, list[Card]] = field(default_factory=dict)

    def made(self, kind: BatchKind) -> str | None:
        """Notes that a card has made a kind of batch. If that was set aside, it no longer is; returns why it was."""
        self._made.add(kind)
        return self.set_aside.pop(kind, None)

    def failed(self, card: Card, at: SlowBatch | LargeBatch, cards: Cards) -> bool:
        """Notes that a card failed at a batch; returns whether its kind is now set aside.

        Args:
            card: the card.
            at: what it was at.
            cards: all cards.
        """
        if isinstance(at, LargeBatch) and at.kind in self._made:
            return False  # so it is this card that has less memory
        lost = self._lost.setdefault(at.kind, [])
        lost.append(card)
        numbers = {card.number for card in lost}
        nodes = {card.node for card in lost}
        if isinstance(at, LargeBatch):
            several = len(numbers) >= MAX_BATCHES_LOST
        else:
            places = numbers if cards.live_on.keys() <= nodes else nodes
            several = len(places) >= MAX_BATCHES_LOST and any(card.has_made for card in lost)
        if not several and (len(lost) < MAX_BATCHES_LOST or cards.others(numbers)):
            return False
        self.set_aside[at.kind] = _why_unmade(at)
        return True


def _why_unmade(at: SlowBatch | LargeBatch) -> str:
    if isinstance(at, SlowBatch):
        return f"batches of {at.kind} take longer than {at.limit}"
    fits = f"a --batch-size of {at.batch_size // 2} may fit" if at.batch_size > 1 else "smaller images may fit"
    return f"no device has memory for batches of {at.batch_size} images of {at.kind}; {fits}"


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
