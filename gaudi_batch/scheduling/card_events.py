"""How events of cards change the state of a run. Pure, a part of the schedule.

Each handler changes the state of the run and returns what is to be done at once, or None if the event changes nothing.
"""

from __future__ import annotations

from collections.abc import Set

from gaudi_batch.plan import BatchKind, Shard
from gaudi_batch.scheduling.admission import Admission
from gaudi_batch.scheduling.capacity import CapacityPlan
from gaudi_batch.scheduling.cards import TRANSITIONS, Card, CardChange, CardState
from gaudi_batch.scheduling.decisions import (
    Admit,
    Decision,
    DropCards,
    GiveBack,
    NoteFault,
    Quarantine,
    Release,
    Replace,
)
from gaudi_batch.scheduling.events import (
    CardBroken,
    CardDied,
    CardGone,
    CardLeaving,
    CardLoaded,
    CardPlaced,
    ClusterSeen,
    LargeBatch,
    Reading,
    SlowBatch,
    StorageStalled,
)
from gaudi_batch.scheduling.failures import Incident, ShardFailures
from gaudi_batch.scheduling.state import RunState

MAX_START_FAILURES = 2
MAX_CONSECUTIVE_FAILURES = 6
MAX_SHARDS_MADE_ELSEWHERE = 3


class CardEvents:
    """The lives of the cards of a run.

    Args:
        state: the run.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._work = state.work
        self._cards = state.cards
        self._admission = Admission(state.rules.requirements)
        self._newcomers: list[Card] = []
        self._now = 0.0
        self.capacity = CapacityPlan(state)

    # -- events -------------------------------------------------------------------------------------------------

    def seen(self, event: ClusterSeen) -> list[Decision]:
        """Asks for cards up to what the job should have, and lets cards of leaving nodes finish."""
        self._now = event.now
        capacity = event.capacity
        decisions: list[Decision] = []
        for card in list(self._cards.by_number.values()):
            if card.state is CardState.QUARANTINED:
                if card.node in capacity.leaving or card.node not in capacity.nodes:
                    # Its place would move to a card of another node.
                    self.change(card, CardChange.NODE_GONE)
                    decisions.append(GiveBack(card.number))
            elif card.node in capacity.leaving:
                decisions += self.leaving(CardLeaving(card.number)) or []
        decisions += self.capacity.adjust(capacity)
        self.capacity.give_up(capacity, event.now)
        return decisions

    def placed(self, event: CardPlaced) -> None:
        """The first process of a card is being started."""
        self.capacity.placed(event.card)
        card = Card(event.card, event.node)
        self._cards.add(card)
        self._state.node_losses.started(card)
        self.change(card, CardChange.PLACED)

    def loaded(self, event: CardLoaded) -> list[Decision] | None:
        """Lets the card work or wait, or refuses it."""
        self._now = event.now
        card, loaded = self._cards.by_number[event.card], event.loaded
        if card.state is not CardState.STARTING or card.loaded is not None:
            return None
        other = self._admission.card_on_module_of(loaded)
        if other is not None and other is not card:
            other_name = other.loaded.name if other.loaded else other.number
            error = f"Ray gave it module {loaded.module} of node {loaded.node}, which card {other_name} holds"
            return [NoteFault(card.number, error), *(self.died(CardDied(card.number, error)) or [])]
        if loaded.node_id != card.node:
            self._cards.move(card, loaded.node_id)
            card.consecutive_failures = card.start_failures = card.shards_made_elsewhere = card.images = (
                card.transient_failures
            ) = 0
            self._cards.file(card)
        if refusal := self._admission.why_unfit(loaded):
            return self._refuse(card, refusal)
        self._admission.add(card, loaded)
        self._newcomers.append(card)
        return []

    def died(self, event: CardDied) -> list[Decision] | None:
        """Replaces or quarantines the card; what was in flight on it is pending again."""
        card = self._cards.by_number[event.card]
        if card.state is CardState.LEAVING:
            self.change(card, CardChange.RELEASED)
            return [Release(card.number)]
        if not card.may(CardChange.REPLACED):
            return None
        stalled: list[int] = []
        if card.state is CardState.STARTING:
            card.start_failures += 1
        else:
            slow = event.slow
            if isinstance(slow, LargeBatch):
                self._lose_large(card, slow)
            else:
                card.consecutive_failures += 1
            if isinstance(slow, SlowBatch) and self._state.unmade.slow(card, slow, self._cards):
                self._set_aside({slow.kind})
            if isinstance(slow, StorageStalled):
                held = [self._work.attempts[attempt].shard for attempt in card.in_flight]
                stalled = held[:1] or [next(iter(self._state.shards))]
            self._note_death(card, event.error, slow is not None)
        decisions = self.replace_or_quarantine(card, event.error)
        for shard in stalled:
            decisions += self._state.storage_failed(card.node, shard, event.error)
        return decisions

    def broken(self, event: CardBroken) -> list[Decision] | None:
        """The same for a card that reports itself that it can't go on."""
        card = self._cards.by_number[event.card]
        if event.storage and card.state is CardState.STARTING:
            card.consecutive_failures += 1
            decisions = self.replace_or_quarantine(card, event.error)
            return decisions + self._state.storage_failed(card.node, next(iter(self._state.shards)), event.error)
        if card.state is CardState.READY and not card.has_succeeded and event.large is None:
            card.start_failures += 1
        return self.died(CardDied(event.card, event.error, event.large))

    def gone(self, event: CardGone) -> list[Decision] | None:
        """Removes a card that left with its node, which counts against no card. If the node did not announce its end,
        the loss counts for the shards in flight on it."""
        card = self._cards.by_number[event.card]
        if not card.may(CardChange.NODE_GONE):
            return None
        if card.state in (CardState.STARTING, CardState.READY):
            self._lose_node(card)
        self.change(card, CardChange.NODE_GONE)
        return [GiveBack(card.number)]

    def leaving(self, event: CardLeaving) -> list[Decision] | None:
        """Lets the card finish what it has begun; it gets nothing more."""
        card = self._cards.by_number[event.card]
        if not card.may(CardChange.NODE_LEAVES):
            return None
        asked_back: list[Decision] = [*self._work.recall_queued_of(card)]
        self._work.drop_reservation(card)
        self.change(card, CardChange.NODE_LEAVES)
        return asked_back

    # -- what follows from other events -------------------------------------------------------------------------

    def admit(self) -> list[Decision]:
        """Lets loaded cards work or wait, or refuses them, as their stacks compare."""
        newcomers, self._newcomers = self._newcomers, []
        decisions, verdicts = self._admission.verdicts(newcomers, len(self._cards.starting), self._now)
        for verdict in verdicts:
            if verdict.refusal:
                decisions += self._refuse(verdict.card, verdict.refusal)
            else:
                self.change(verdict.card, CardChange.ADMITTED)
                decisions.append(Admit(verdict.card.number))
        return decisions

    def made(self) -> None:
        """Notes that a card has made a shard: the stack of the run's images is settled."""
        self._admission.settle()

    def release_leaving(self) -> list[Decision]:
        """Releases the leaving cards that have nothing in flight any more."""
        free = list(self._cards.leaving_idle.values())
        for card in free:
            self.change(card, CardChange.RELEASED)
        return [Release(card.number) for card in free]

    def release_idle(self) -> list[Decision]:
        """Releases the cards that have nothing in flight, and asks for no other: the run stops, and each would be paid
        for until the last one has ended."""
        filed = (self._cards.starting, self._cards.open[0], self._cards.apart)
        idle = [card for cards in filed for card in cards.values() if not card.in_flight]
        idle += self._cards.in_states(CardState.QUARANTINED)
        for card in idle:
            self.change(card, CardChange.NOT_NEEDED)
        unplaced = tuple(self._cards.unplaced)
        self._cards.unplaced.clear()
        return [*(Release(card.number) for card in idle), *([DropCards(unplaced)] if unplaced else [])]

    def record_success(self, card: Card) -> None:
        """Notes that a card has made something."""
        card.has_succeeded = card.has_made = True
        card.consecutive_failures = card.start_failures = 0
        self._state.node_losses.made()

    def replace_or_quarantine(self, card: Card, error: str) -> list[Decision]:
        """Replaces or quarantines a card whose process has ended or makes nothing."""
        self._state.last_error = error
        if card.start_failures >= MAX_START_FAILURES:
            return self._quarantine(card, f"it made nothing in {card.start_failures} starts: {error}")
        if card.consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            return self._quarantine(card, f"it failed {card.consecutive_failures} times in a row: {error}")
        self.change(card, CardChange.REPLACED)
        return [Replace(card.number)]

    def made_elsewhere(self, card: Card, maker: Card) -> list[Decision]:
        """Notes that other cards made all that was in flight on this one when it failed."""
        if card is maker or not card.may(CardChange.GIVEN_UP):
            return []
        card.shards_made_elsewhere += 1
        if card.shards_made_elsewhere < MAX_SHARDS_MADE_ELSEWHERE:
            return []
        return self._quarantine(card, f"{card.shards_made_elsewhere} shards that it failed were made by other cards")

    def count_transient(self, card: Card, images: int, failures: int) -> list[Decision]:
        """Counts images of a card that failed and worked when repeated."""
        self._state.transient_failures.add(card, images, failures)
        reason = None
        if failures and card.state is CardState.READY:
            reason = self._state.transient_failures.verdict(card, self._cards.live_cards())
        if reason is None or not self._cards.others({card.number}):
            return []  # an image that is right the second time is better than none
        return self._quarantine(card, reason)

    def change(self, card: Card, change: CardChange) -> None:
        """Moves a card to another state. Only a ready card keeps captured graphs; a leaving one may still have shards
        in flight."""
        card.state = state = TRANSITIONS[card.state, change]
        if change is CardChange.ADMITTED:
            self._admission.admitted(card)
        else:
            self._admission.remove(card)
        if state not in (CardState.READY, CardState.LEAVING):
            for attempt in reversed(list(card.in_flight)):
                self._state.put_back(self._work.release(attempt).shard)
        if state is not CardState.READY:
            self._work.drop_reservation(card)
        if state not in (CardState.READY, CardState.LEAVING):
            self._work.affinity.forget(card.number)
            self._work.pending.readers.forget(card.number)
            self._state.backups.pace.forget(card.number)
            card.has_succeeded = False
            card.dropping = None
        self._state.capacity_expected |= state in (CardState.GONE, CardState.QUARANTINED)
        self._cards.file(card)

    def _refuse(self, card: Card, reason: str) -> list[Decision]:
        """Refuses a card: neither it nor another process in its place may work for this run."""
        self._state.last_error = reason
        return [NoteFault(card.number, reason, quiet=True), *self._quarantine(card, reason)]

    def _quarantine(self, card: Card, reason: str) -> list[Decision]:
        self.change(card, CardChange.GIVEN_UP)
        return [Quarantine(card.number, reason)]

    # -- what was at fault ---------------------------------------------------------------------------------------

    def _lose_large(self, card: Card, large: LargeBatch) -> None:
        shard = self._state.shards[large.shard]
        if self._state.unmade.large(card, large, shard, self._cards):
            kinds = {each.bucket.batch_kind for each in self._state.shards.values()}
            self._set_aside({kind for kind in kinds if kind.graph_key == shard.bucket.graph_key})

    def _set_aside(self, kinds: Set[BatchKind]) -> None:
        """Looks again at the pending shards of some kinds of batches: those that are set aside are given up."""
        for kind in kinds:
            for shard in self._work.take_kind(kind):
                self._state.put_back(shard)

    def _note_death(self, card: Card, error: str, no_row: bool) -> None:
        """Counts the death of a card's process for the shards in flight; `no_row` says that no row caused it."""
        in_flight = list(card.in_flight)
        # A process may still store one shard while it makes the next.
        generating = [attempt for attempt in in_flight if self._work.attempts[attempt].generating]
        at_work = (generating[-1:] or in_flight[:1] or [""])[0]
        shards = {self._work.attempts[attempt].shard for attempt in in_flight}
        explained = any(self._work.row_groups.by_row(self._state.shards[shard]) for shard in shards)
        incident = Incident(card.number, set() if explained else shards)
        for attempt in reversed(in_flight):
            live = self._work.release(attempt)
            failures = self._work.failures.setdefault(live.shard, ShardFailures())
            failures.incidents.append(incident)
            if attempt == at_work:
                others = self._cards.others({*failures.died_on, card.number})
                at = None if no_row else live.at
                failures.died(card.number, error, at, others)
                if isinstance(at, Reading):
                    self._note_deadly_reading(failures, self._state.shards[live.shard], at, others)
                self._state.try_again(live.shard)
            else:
                # That shard may have been read or stored at the moment, or not have begun.
                failures.announce = True
                self._state.put_back(live.shard)

    def _note_deadly_reading(self, failures: ShardFailures, shard: Shard, at: Reading, others: bool) -> None:
        """Counts the death of a process for the row groups that it had announced to decode."""
        if self._work.row_groups.killed(shard, at):
            failures.count_tries_anew()
            self._work.reconsider()
            for number, other in self._work.failures.items():
                if self._work.row_groups.by_row(self._state.shards[number]):
                    other.explain()  # this group may have killed the others, too
        nodes = {self._cards.by_number[number].node for number in failures.died_on}
        other_nodes = bool(self._cards.live_on.keys() - nodes)
        if at.by_row and failures.is_certain_of_reading(others) and (len(nodes) > 1 or not other_nodes):
            reason = "the card's process died reading this row, or one before it in row group"
            self._work.row_groups.mark_unreadable(shard, at, f"{reason} {at.group}: {failures.error}")
            failures.count_tries_anew()

    def _lose_node(self, card: Card) -> None:
        """Removes all cards of a node that went without notice."""
        self._work.keep_off(card.node)
        self._state.node_losses.lost(card)
        for attempt in reversed(list(card.in_flight)):
            live = self._work.release(attempt)
            if live.begun:
                failures = self._work.failures.setdefault(live.shard, ShardFailures())
                self._state.retries += failures.alone_on_node
                others = self._cards.others({*failures.died_on, card.number})
                alone = failures.alone_on_node
                failures.lost_with_node(card.number, live.at, others)
                if alone and isinstance(live.at, Reading):
                    self._note_deadly_reading(failures, self._state.shards[live.shard], live.at, others)
            self._state.put_back(live.shard)
