"""What several failures together say of storage, a time limit, a card or nodes. Pure, a part of the schedule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field

from gaudi_batch.plan import BatchKind, Bucket, GraphKey, Shard
from gaudi_batch.scheduling.cards import Card, Cards
from gaudi_batch.scheduling.events import LargeBatch, SlowBatch

MIN_STORAGE_NODES = 2
"""Storage counts as gone once it has failed for all nodes, if these are at least so many."""
MAX_BATCHES_LOST = 2
"""A kind of batch is set aside once so many cards have failed at it and none has made one."""
MAX_SHARDS_ASIDE = 8
"""A size of which no card has made any is set aside once so many of its shards were, whose texts may be long."""
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
class UnmadeBatches:
    """Batches that no card makes in time, or for which no device has memory. That is the job's mistake, and no row's or
    card's.

    Of a kind that is slow, cards of two nodes must have been killed, of which one makes other batches, as some hang at
    whatever they are given; or all cards that there are, twice. Where all are on one node, two of its cards are enough.
    For memory two cards are enough wherever they are, or one twice where there is no other: steps don't matter, and a
    process that ran out of memory held nothing else. A shard may have longer texts than others of its size, where a
    family pads them to different lengths: it is set aside alone if cards make the size, or have failed at few such.
    """

    _slow: dict[BatchKind, str] = field(default_factory=dict)
    _too_large: dict[GraphKey | int, str] = field(default_factory=dict)
    """Reasons of what is set aside for want of memory: sizes, and numbers of shards."""
    _made: set[GraphKey] = field(default_factory=set)
    _shards_aside: Counter[GraphKey] = field(default_factory=Counter)
    """How many shards of a size are set aside alone."""
    _lost: dict[BatchKind | GraphKey | int, list[Card]] = field(default_factory=dict)

    @property
    def reasons(self) -> list[str]:
        """Why batches are set aside."""
        return [*self._slow.values(), *self._too_large.values()]

    def why(self, shard: Shard) -> str | None:
        """Why a shard is not tried any more; None if it is."""
        bucket = shard.bucket
        too_large = self._too_large.get(bucket.graph_key) or self._too_large.get(shard.number)
        return self._slow.get(bucket.batch_kind) or too_large

    def made(self, bucket: Bucket) -> list[str]:
        """Notes that a card has made a batch. If its kind was set aside, it no longer is; returns why it was."""
        self._made.add(bucket.graph_key)
        lifted = [self._slow.pop(bucket.batch_kind, None), self._too_large.pop(bucket.graph_key, None)]
        return [reason for reason in lifted if reason is not None]

    def slow(self, card: Card, at: SlowBatch, cards: Cards) -> bool:
        """Notes that a card was killed at a batch of a kind that no card has made; returns whether the kind is now set
        aside."""
        lost = self._lost.setdefault(at.kind, [])
        lost.append(card)
        nodes = {card.node for card in lost}
        places = {card.number for card in lost} if cards.live_on.keys() <= nodes else nodes
        several = len(places) >= MAX_BATCHES_LOST and any(card.has_made for card in lost)
        if not several and not _is_all(lost, cards):
            return False
        self._slow[at.kind] = f"batches of {at.kind} take longer than {at.limit}"
        return True

    def large(self, card: Card, at: LargeBatch, shard: Shard, cards: Cards) -> bool:
        """Notes that a card's device had no memory for a batch; returns whether its size is now set aside."""
        size = shard.bucket.graph_key
        alone = size in self._made or (at.texts_differ and self._shards_aside[size] < MAX_SHARDS_ASIDE)
        key = shard.number if alone else size
        lost = self._lost.setdefault(shard.number if at.texts_differ else key, [])
        lost.append(card)
        if len({card.number for card in lost}) < MAX_BATCHES_LOST and not _is_all(lost, cards):
            return False
        self._shards_aside[size] += alone
        what = f"rows of shard {shard.number}" if alone else f"{size.width}x{size.height}"
        guided = "" if alone or not size.guided else " with guidance"
        fits = f"a --batch-size of {at.batch_size // 2}" if at.batch_size > 1 else "smaller images"
        images = f"{at.batch_size} images of {what}{guided}"
        self._too_large[key] = f"no device has memory for batches of {images}; {fits}, in a new output, may fit"
        return not alone


def _is_all(lost: list[Card], cards: Cards) -> bool:
    """Whether cards have failed twice, and there is no other."""
    return len(lost) >= MAX_BATCHES_LOST and not cards.others({card.number for card in lost})


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
