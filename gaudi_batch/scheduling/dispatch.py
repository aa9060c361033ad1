"""Which card has which shard, and which card gets which shard next. Pure, a part of the schedule.

* A card holds at most `MAX_IN_FLIGHT` shards, so that it never waits for the next one; it gets the second only while
  there are more shards than cards without one. A queued shard that has not begun is recalled as soon as a card that
  may have it has nothing to do.
* A shard that a card has failed goes elsewhere if any other card is left; after two cards it no longer waits for one
  that starts.
* A suspect shard gets a card that holds nothing else; one that may take nodes down gets a node on which nothing else is
  in flight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace

from gaudi_batch.plan import BatchKind, GraphKey, Shard
from gaudi_batch.scheduling.affinity import Affinity
from gaudi_batch.scheduling.card_choice import CardChoice
from gaudi_batch.scheduling.cards import Attempt, Card, Cards
from gaudi_batch.scheduling.decisions import Assign, Decision, Recall
from gaudi_batch.scheduling.failures import ShardFailures
from gaudi_batch.scheduling.pending import Pending
from gaudi_batch.scheduling.rowgroups import RowGroups

MAX_LOOKED_AT = 16
"""Suspect shards for which one event looks for a card."""
NODES_PER_EXCLUSIVE = 4
"""While other work waits, at most one node in so many is kept free for a suspect shard."""


class Dispatch:
    """The shards of a run that are not made yet, in flight or pending.

    Args:
        shards: what is to be made, by number.
        prefix: what makes this driver's attempts unique over all drivers.
        max_graphs: graph keys whose graphs a card keeps.
    """

    def __init__(self, shards: Mapping[int, Shard], prefix: str, max_graphs: int) -> None:
        self.affinity = Affinity(max_graphs)
        self.cards = Cards(self.affinity)
        self.pending = Pending(shards)
        self.attempts: dict[str, Attempt] = {}
        self.failures: dict[int, ShardFailures] = {}
        """What is known of the shards that have failed."""
        self._choice = CardChoice(self.cards, self.affinity, self.pending, self.failures, shards)
        self.row_groups = RowGroups()
        self._shards = shards
        self.attempts_at: dict[int, dict[str, None]] = {}
        """The attempts in flight by shard, the first one first."""
        self._prefix = prefix
        self._sent = 0
        self._queued: dict[GraphKey, dict[str, Attempt]] = {}  # queued behind another shard and not recalled yet
        self._asked_back: set[str] = set()  # recalled and not answered yet
        self.to_watch: list[str] = []
        """Attempts whose cards have to begin them or to give them back now: those that have become a card's first, or
        were recalled, since somebody looked here."""
        self._reserved: dict[int, Card] = {}  # the cards that are kept free for suspect shards
        self._due: dict[int, None] = {}  # suspect shards for which a card or node may have become free

    def count_pending(self) -> int:
        """How many shards no card has."""
        return len(self.pending) + len(self._reserved)

    def unassigned(self) -> list[int]:
        """The shards that no card has."""
        return [*self.pending.numbers(), *self._reserved]

    def demand(self) -> int:
        """Cards that could work: the usable ones, and one for each shard that is left when each of them without work
        has taken one."""
        return self.cards.live_cards() + max(0, len(self.pending) - self.cards.without_work())

    def next(self) -> list[Decision]:
        """Assigns what can be assigned now, and recalls what an idle card could begin."""
        decisions = [*self._assign_suspects(), *self._assign()]
        # Some fresh shards may have become suspect.
        return [*decisions, *self._assign_suspects(), *self._recall_for_idle()]

    def recall_all(self) -> list[Recall]:
        """Recalls all queued shards."""
        return [self._recall(attempt) for queued in list(self._queued.values()) for attempt in list(queued)]

    def recall_queued_of(self, card: Card) -> list[Recall]:
        """Recalls what is queued on one card."""
        key_of = {attempt: self._shards[self.attempts[attempt].shard].bucket.graph_key for attempt in card.in_flight}
        return [self._recall(attempt) for attempt, key in key_of.items() if attempt in self._queued.get(key, ())]

    def answered(self, attempt: str) -> None:
        """A card has answered a recall."""
        self._asked_back.discard(attempt)

    def put_back(self, shard: int) -> None:
        """Makes a shard pending again, before those that have not been tried."""
        failures = self.failures.get(shard)
        if failures is not None and failures.alone_on_node:
            self.pending.put_suspect(shard, alone_on_node=True)
        elif (failures is not None and failures.announce) or self.row_groups.doubt(self._shards[shard]):
            self.pending.put_suspect(shard)
        else:
            self.pending.put_returned(shard)

    def settle(self, shard: int) -> None:
        """Notes that a shard was read or given up: what it was to find out about row groups is known as far as
        possible."""
        if self.row_groups.settle(shard):
            # The first shard of a group goes first: the row that kills may lie before the rows of all others.
            for number in self.pending.take_parked():
                self.put_back(number)

    def reconsider(self) -> None:
        """Notes that a row group has killed: those of its shards that have come back are suspect now."""
        for shard in self.pending.take_returned(lambda shard: bool(self.row_groups.doubt(self._shards[shard]))):
            self.pending.put_suspect(shard)

    def take_kind(self, kind: BatchKind) -> list[int]:
        """Takes out all pending shards of one kind of batch."""
        for shard, card in list(self._reserved.items()):
            if self._shards[shard].bucket.batch_kind == kind:
                self.drop_reservation(card)
                self.cards.file(card)
        return self.pending.take_kind(kind)

    def take(self, shard: int) -> bool:
        """Takes out one shard; returns whether it was pending."""
        if shard in self._reserved:
            self.drop_reservation(card := self._reserved[shard])
            self.cards.file(card)
        return self.pending.take(shard)

    def keep_off(self, node: str) -> None:
        """Notes a node that went without notice: its cards get nothing more."""
        self.cards.lost.add(node)
        for card in self.cards.on(node):
            self.drop_reservation(card)
            self.cards.file(card)

    def release(self, attempt: str) -> Attempt:
        """Ends an attempt: its shard is no longer in flight."""
        live = self.attempts.pop(attempt)
        card = live.card
        self._asked_back.discard(attempt)
        self._unqueue(attempt, live)
        del card.in_flight[attempt]
        del self.attempts_at[live.shard][attempt]
        if not self.attempts_at[live.shard]:
            del self.attempts_at[live.shard]
        for first in card.in_flight:
            self._unqueue(first, self.attempts[first])  # it is no longer queued behind another
            self.to_watch.append(first)
            break
        self.cards.attempts_on_node[card.node] -= 1
        card.suspect = False
        self.cards.free_node(card.node, live.shard)
        self.cards.file(card)
        if card.reserved_for is not None:
            self._due[card.reserved_for] = None
        if card.node in self.cards.exclusive:
            self._due[self.cards.exclusive[card.node]] = None
        return live

    def _unqueue(self, attempt: str, live: Attempt) -> None:
        self._queued.get(self._shards[live.shard].bucket.graph_key, {}).pop(attempt, None)

    def _assign(self) -> list[Decision]:
        decisions: list[Decision] = []
        for level, cards in enumerate(self.cards.open):
            # Cards without any shard come first, also those that are still starting.
            while cards and self.pending.plain > (self.cards.without_work() if level else 0):
                match = self._match(level)
                if match is None:
                    break
                decisions.append(self.send(*match))
        return decisions

    def _match(self, level: int) -> tuple[Card, int] | None:
        """A card with so many shards in flight, and the shard for it."""
        cards = self.cards.open[level]
        for shard in self.pending.first_returned():
            able = next(self._choice.open_for(shard, level), None)
            if able is not None:
                self.pending.take(shard)
                return able, shard
        while cards and self.pending.fresh_images:
            card = next(iter(cards.values()))
            key = self._choose_key(card)
            if key is None:
                # No key is worth a capture for any card; cards that have captured one may go on with it.
                by_key = map(self.cards.by_key[level].get, self.pending.fresh_images)
                card = next((next(iter(captured.values())) for captured in by_key if captured), card)
                key = self._choose_key(card)
            if key is None:
                return None
            shard = self.pending.take_fresh(key, card.number)
            if not self.row_groups.doubt(self._shards[shard]):
                return card, shard
            self.put_back(shard)
        return None

    def _choose_key(self, card: Card) -> GraphKey | None:
        return self.affinity.choose(card.number, self.pending.fresh_images)

    def _assign_suspects(self) -> list[Decision]:
        """Keeps a card for each suspect shard, and sends it when the card has nothing else in flight."""
        decisions: list[Decision] = []
        self._free_busy()
        for suspects in (self.pending.suspects, self.pending.node_suspects):
            # A few at a time: an event must not cost more if many wait for the same cards.
            for shard in list(itertools.islice(suspects, MAX_LOOKED_AT)):
                if not (self.cards.full or any(self.cards.open)):
                    break
                if self.row_groups.block(self._shards[shard]):
                    self.pending.take(shard)
                    self.pending.park(shard)
                    continue
                if suspects is self.pending.node_suspects and not self._may_keep_node():
                    break
                decisions += self._reserve(shard)
        while self._due:
            shard = next(iter(self._due))
            del self._due[shard]
            card = self._reserved.get(shard)
            if card is None or card.in_flight:
                continue
            exclusive_shard = self.cards.exclusive.get(card.node, shard)
            if exclusive_shard != shard or (self._is_alone_on_node(shard) and self.cards.attempts_on_node[card.node]):
                continue
            del self._reserved[shard]
            card.reserved_for = None
            decisions.append(self.send(card, shard))
        return decisions

    def _free_busy(self) -> None:
        """Ends reservations of cards that still work, which they may do for long, where a better one idles."""
        for shard, card in list(itertools.islice(self._reserved.items(), MAX_LOOKED_AT if self.cards.open[0] else 0)):
            if card.in_flight and not self._is_alone_on_node(shard):
                best = next(self._choice.for_suspect(shard), card)
                nodes = self._choice.nodes_died_on(shard)
                if not best.in_flight and (best.node not in nodes or card.node in nodes):
                    self.drop_reservation(card)
                    self.cards.file(card)

    def _may_keep_node(self) -> bool:
        kept = len(self.cards.exclusive)
        return not kept or not self.pending.plain or kept < len(self.cards.live_on) // NODES_PER_EXCLUSIVE

    def _reserve(self, shard: int) -> list[Decision]:
        able = self._choice.for_suspect(shard)
        if self._is_alone_on_node(shard):
            chosen = min(able, key=lambda card: self.cards.attempts_on_node[card.node], default=None)
        else:
            chosen = next(able, None)
        if chosen is None:
            return []
        self.pending.take(shard)
        self._reserved[shard] = chosen
        chosen.reserved_for = shard
        cards = [chosen]
        if self._is_alone_on_node(shard):
            cards = self.cards.on(chosen.node)
            for card in cards:
                if card is not chosen:
                    self.drop_reservation(card)
            self.cards.exclusive[chosen.node] = shard
        for card in cards:
            self.cards.file(card)
        self._due[shard] = None
        return [recall for card in cards for recall in self.recall_queued_of(card)]

    def drop_reservation(self, card: Card) -> None:
        """Keeps another card free in place of this one."""
        shard, card.reserved_for = card.reserved_for, None
        if shard is None:
            return
        del self._reserved[shard]
        self.put_back(shard)
        self.cards.free_node(card.node, shard)

    def _is_alone_on_node(self, shard: int) -> bool:
        return shard in self.failures and self.failures[shard].alone_on_node

    def send(self, card: Card, shard: int, backup_of: str | None = None) -> Assign:
        """Begins an attempt at a shard on a card; beside another attempt, if that is named."""
        self._sent += 1
        attempt = f"{self._prefix}{self._sent}"
        task = self.failures.get(shard, ShardFailures()).task(self._shards[shard], attempt, self.row_groups)
        key = task.shard.bucket.graph_key
        task = replace(task, backup_of=backup_of)
        live = self.attempts[attempt] = Attempt(shard, card, self.affinity.use(card.number, key))
        self.attempts_at.setdefault(shard, {})[attempt] = None
        self.pending.readers.move(card.number, (task.shard.file, task.shard.group))
        if card.in_flight:
            self._queued.setdefault(key, {})[attempt] = live
        else:
            self.to_watch.append(attempt)
        card.in_flight[attempt] = None
        card.suspect = task.announce
        self.cards.attempts_on_node[card.node] += 1
        self.cards.file(card)
        return Assign(card.number, task)

    def _recall_for_idle(self) -> list[Decision]:
        """For each idle card, recalls a queued shard that the card may have."""
        decisions: list[Decision] = []
        idle = self.cards.open[0]
        served: set[int] = set()
        if len(self._asked_back) >= len(idle):
            return decisions
        for key in self._queued:
            for card, attempt in self._idle_and_queued(key, served):
                if len(self._asked_back) >= len(idle):
                    return decisions
                served.add(card.number)
                decisions.append(self._recall(attempt))
        return decisions

    def _idle_and_queued(self, key: GraphKey, served: set[int]) -> Iterable[tuple[Card, str]]:
        """Idle cards, each with a queued attempt of this key that it may have."""
        idle, queued = self.cards.open[0], self._queued[key]
        if not idle or not queued:
            return
        images = self._shards[next(iter(queued.values())).shard].images
        # A list, since recalled attempts leave the queue meanwhile.
        suited = idle if self.affinity.is_worth_it(key, images, images) else self.cards.by_key[0].get(key, {})
        for card in suited.values():
            if card.number in served:
                continue
            attempt = next((name for name, live in queued.items() if self._choice.may_have(card, live.shard)), None)
            if attempt is not None:
                yield card, attempt
            if not queued:
                return

    def _recall(self, attempt: str) -> Recall:
        live = self.attempts[attempt]
        self._unqueue(attempt, live)
        live.recallable = False
        self._asked_back.add(attempt)
        self.to_watch.append(attempt)
        return Recall(live.card.number, attempt)
