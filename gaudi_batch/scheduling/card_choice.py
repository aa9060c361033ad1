"""Which cards a shard may go to that comes back from another card, the best first. Pure, a part of the schedule.

A card that has captured the shard's graph is best. Another one gets the shard only where the work that is left is worth
the capture, or where no card that has captured the graph could make it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from gaudi_batch.plan import Shard
from gaudi_batch.scheduling.affinity import Affinity
from gaudi_batch.scheduling.cards import Card, Cards
from gaudi_batch.scheduling.failures import ShardFailures
from gaudi_batch.scheduling.pending import Pending

ENOUGH_CARDS = 2
"""A shard that so many cards have failed may go to one of them again while others start."""
MAX_COMPARED = 64
"""Cards among which one is chosen for its node."""


class CardChoice:
    """Compares the cards of a run for one shard.

    Args:
        cards: all cards.
        affinity: which graphs they have captured.
        pending: what waits.
        failures: what is known of the shards that have failed.
        shards: all shards, by number.
    """

    def __init__(
        self,
        cards: Cards,
        affinity: Affinity,
        pending: Pending,
        failures: Mapping[int, ShardFailures],
        shards: Mapping[int, Shard],
    ) -> None:
        self._cards = cards
        self._affinity = affinity
        self._pending = pending
        self._failures = failures
        self._shards = shards

    def may_have(self, card: Card, shard: int) -> bool:
        """Whether a card may have a shard: not one that has failed it, as long as there are others."""
        failures = self._failures.get(shard)
        if failures is None or card.number not in failures.failed_on:
            return True
        # One card may be wrong, so a starting one is waited for as the second; after two cards none is waited for.
        failed_on = set(failures.failed_on)
        return not self._cards.others(failed_on, starting=len(failed_on) < ENOUGH_CARDS)

    def open_for(self, shard: int, level: int) -> Iterator[Card]:
        """The cards that may have a shard which has come back, of those with `level` shards in flight."""
        cards = [self._captured(shard, level)]
        if not self._has_captured_card(shard):
            cards.append(self._cards.open[level].values())
        elif level == 0:
            cards.append(self._free_to_capture(shard))
        return self._able(shard, cards)

    def for_suspect(self, shard: int) -> Iterator[Card]:
        """The cards that may have a suspect shard, also those that work: it has to wait for these."""
        nodes = self.nodes_died_on(shard)
        if not nodes:
            return self._able(shard, self._for_suspect(shard))
        # Another node is better: a bad node has several cards.
        elsewhere = (card for card in self._able(shard, self._for_suspect(shard)) if card.node not in nodes)
        others = (card for card in self._able(shard, self._for_suspect(shard)) if card.node in nodes)
        return itertools.islice(itertools.chain(elsewhere, others), MAX_COMPARED)

    def _for_suspect(self, shard: int) -> Iterator[Iterable[Card]]:
        yield self._captured(shard, 0)
        yield self._free_to_capture(shard)
        for level in range(1, len(self._cards.by_key)):
            yield self._captured(shard, level)
        if not self._has_captured_card(shard):
            for cards in (*self._cards.open, self._cards.full):
                yield cards.values()

    def nodes_died_on(self, shard: int) -> set[str]:
        """The nodes of the cards that have died of a shard."""
        failures = self._failures.get(shard)
        return self._cards.nodes_of(failures.died_on) if failures else set()

    def _able(self, shard: int, cards: Iterable[Iterable[Card]]) -> Iterator[Card]:
        return (card for card in itertools.chain.from_iterable(cards) if self.may_have(card, shard))

    def _captured(self, shard: int, level: int) -> Iterable[Card]:
        return self._cards.by_key[level].get(self._shards[shard].bucket.graph_key, {}).values()

    def _free_to_capture(self, shard: int) -> Iterable[Card]:
        """The idle cards, if the work that waits is worth a capture."""
        key, images = self._shards[shard].bucket.graph_key, self._shards[shard].images
        is_worth_it = self._affinity.is_worth_it(key, max(images, self._pending.images(key)), images)
        return self._cards.open[0].values() if is_worth_it else ()

    def _has_captured_card(self, shard: int) -> bool:
        """Whether a card that has captured the graph could make the shard, soon and as well as any other."""
        failures = self._failures.get(shard)
        failed_on = failures.failed_on if failures else ()
        nodes = self.nodes_died_on(shard)
        levels = (self._captured(shard, level) for level in range(len(self._cards.by_key)))
        captured = itertools.chain(*levels, self._captured_apart(shard))
        return any(card.number not in failed_on and card.node not in nodes for card in captured)

    def _captured_apart(self, shard: int) -> Iterator[Card]:
        """Cards that will be open again once they have made the suspect shard that they are kept for."""
        key = self._shards[shard].bucket.graph_key
        for card in itertools.islice(self._cards.apart.values(), MAX_COMPARED):
            will_be_open = card.dropping is None and card.node not in self._cards.lost
            if will_be_open and key in self._affinity.captured(card.number):
                yield card
