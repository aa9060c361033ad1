"""What several failures together say of storage, of a time limit, of a card, of nodes. Pure, a part of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field

from gaudi_batch.cards import Card
from gaudi_batch.events import SlowBatch
from gaudi_batch.plan import BatchKind

MIN_STORAGE_NODES = 2
"""Nodes for which storage must fail before it is taken for gone on their word."""
MAX_CUTS = 2
"""Times that batches of a kind pass their limit, and nobody has made one, before they are set aside."""
MAX_FRUITLESS_NODES = 8
"""Nodes lost one after the other, with nothing made between, before nothing more is expected of others."""
MAX_TRANSIENT_FAILURES = 3
TRANSIENT_FACTOR = 4
"""How much larger than the others' share a card's share of such failures must be."""


@dataclass
class StorageFailures:
    """For which nodes storage has failed since any card last stored a shard.

    It is gone when it fails for the driver, too, or for every node that has cards, if these are at least two: what one
    node can't do, another may.
    """

    being_checked: bool = False
    """Whether the driver is looking itself."""
    _nodes: set[str] = field(default_factory=set)

    def failed(self, node: str, usable: Set[str]) -> bool:
        """It failed for a card of a node; returns whether it is gone.

        Args:
            node: the node.
            usable: the nodes of all cards that are ready or starting.
        """
        self._nodes.add(node)
        return len(self._nodes) >= MIN_STORAGE_NODES and usable <= self._nodes

    def works(self) -> None:
        """A card has stored a shard."""
        self._nodes.clear()


@dataclass
class SlowKinds:
    """Kinds of batches that no card makes in time. That is the job's mistake, and no row's or card's.

    Two cards must have been killed at one, of which one makes other batches, as some hang at whatever they are given;
    or all cards that there are.
    """

    set_aside: dict[BatchKind, str] = field(default_factory=dict)
    """Those that are not tried any more, with the reason."""
    _cut: dict[BatchKind, list[Card]] = field(default_factory=dict)

    def cut(self, card: Card, slow: SlowBatch, others: Callable[[set[int]], bool]) -> bool:
        """A card was killed at a batch of a kind that nobody has made; returns whether that kind is now set aside.

        Args:
            card: the card.
            slow: what it was at.
            others: whether there is a card that is none of these.
        """
        cards = self._cut.setdefault(slow.kind, [])
        cards.append(card)
        numbers = {card.number for card in cards}
        several = len(numbers) >= MAX_CUTS and any(card.has_made for card in cards)
        if not several and (len(cards) < MAX_CUTS or others(numbers)):
            return False
        self.set_aside[slow.kind] = f"batches of {slow.kind} take longer than {slow.limit}"
        return True


@dataclass
class TransientFailures:
    """Images and calls that failed and worked when they were made again on the same card. All cards may have some, if
    the model is like that; one that has far more than the others is bad."""

    _images: int = 0
    _failures: int = 0

    def add(self, card: Card, images: int, failures: int) -> None:
        """A card has made so many images, with so many failures among them."""
        card.images += images
        card.transient_failures += failures
        self._images += images
        self._failures += failures

    def verdict(self, card: Card) -> str | None:
        """Why a card is bad, or None."""
        other_images, other_failures = self._images - card.images, self._failures - card.transient_failures
        share = card.transient_failures * other_images  # both sides times the images of the card and of the others
        if card.transient_failures < MAX_TRANSIENT_FAILURES:
            return None
        if share <= TRANSIENT_FACTOR * (other_failures + 1) * card.images:
            return None
        failures = f"{card.transient_failures} of its {card.images} images came out wrong"
        return f"{failures} and were right when they were made again"


@dataclass
class NodeLosses:
    """Nodes that were lost one after the other before a card of theirs had made anything: loading takes them down, or
    they do not live long enough."""

    fruitless: int = 0

    def started(self, card: Card) -> None:
        """A card is being started."""
        card.fruitless_nodes = self.fruitless

    def lost(self, card: Card) -> None:
        """A card's node went without notice. Nodes that go at the same time count once."""
        if not card.has_made and card.fruitless_nodes == self.fruitless:
            self.fruitless += 1

    def made(self) -> None:
        """A card has made something."""
        self.fruitless = 0

    @property
    def hopeless(self) -> bool:
        """Whether nothing is to be expected of more nodes."""
        return self.fruitless >= MAX_FRUITLESS_NODES
