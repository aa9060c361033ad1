"""How events of attempts change the state of a run. Pure, a part of the schedule.

Each handler changes the state of the run and returns what is to be done at once, or None if the event changes nothing,
as it is of an attempt that is not live.
"""

from __future__ import annotations

from gaudi_batch.scheduling.card_events import CardEvents
from gaudi_batch.scheduling.cards import Card, CardState
from gaudi_batch.scheduling.decisions import Commit, Decision, Discard
from gaudi_batch.scheduling.events import (
    AttemptEnded,
    BatchAnnounced,
    DoubtsChecked,
    ReadingAnnounced,
    RecallAnswered,
    ShardBegun,
    ShardCommitted,
    ShardFailed,
    ShardMade,
    ShardOutcome,
    StorageChecked,
)
from gaudi_batch.scheduling.failures import Held, Incident, ShardFailures
from gaudi_batch.scheduling.state import RunState


class ShardEvents:
    """What becomes of the shards of a run.

    Args:
        state: the run.
        cards: the lives of its cards.
    """

    def __init__(self, state: RunState, cards: CardEvents) -> None:
        self._state = state
        self._work = state.work
        self._cards = cards

    # -- events -------------------------------------------------------------------------------------------------

    def begun(self, event: ShardBegun) -> None:
        """Notes what a card has begun, in case it dies."""
        live = self._work.attempts.get(event.attempt)
        if live is not None:
            live.begun = True
            is_first = next(iter(live.card.in_flight)) == event.attempt
            # The shard before it may be on its way to storage.
            if event.now is not None and (is_first or event.generating) and not live.generating:
                self._state.backups.begun(event.attempt, event.now)
            live.generating = live.generating or event.generating

    def reading(self, event: ReadingAnnounced) -> None:
        """Notes which row group of a suspect shard a card reads, in case it dies."""
        live = self._work.attempts.get(event.attempt)
        if live is not None:
            live.at = event.reading

    def batch(self, event: BatchAnnounced) -> list[Decision] | None:
        """Notes which rows of a suspect shard a card makes, in case it dies; what it announced before went well."""
        live = self._work.attempts.get(event.attempt)
        if live is None:
            return None
        if isinstance(live.at, frozenset):
            self._cards.record_success(live.card)  # it has made what it announced before
        live.at = frozenset(event.rows)
        self._work.settle(live.shard)
        return []

    def made(self, event: ShardMade) -> list[Decision] | None:
        """Has the shard committed, or holds its record until another card has made the doubted rows."""
        if event.attempt not in self._work.attempts:
            return None
        live, outcome = self._work.release(event.attempt), event.outcome
        card, shard = live.card, self._state.shards[live.shard]
        self._cards.made()
        self._work.affinity.took(shard.bucket.graph_key, outcome.seconds, shard.images, live.captures)
        self._state.backups.took(live, outcome.seconds)
        self._state.storage_failures.works()
        self._cards.record_success(card)
        card.shards_made_elsewhere = max(0, card.shards_made_elsewhere - 1)
        self._work.settle(live.shard)
        if outcome.seconds:  # else no batch was made
            self._state.lift(shard.bucket)
        decisions: list[Decision] = [*self._state.backups.end_others(live.shard)]
        decisions += self._cards.count_transient(card, shard.images, outcome.transient_failures)
        if outcome.doubted:
            failures = self._work.failures.setdefault(live.shard, ShardFailures())
            failures.await_confirmation(Held(event.attempt, card.number, outcome))
            self._state.put_back(live.shard)
            return decisions
        return decisions + self._accept(live.shard, event.attempt, outcome, card)

    def doubts_checked(self, event: DoubtsChecked) -> list[Decision] | None:
        """Has the held record committed if the doubted rows failed on this card, too; else the shard is made again."""
        if event.attempt not in self._work.attempts:
            return None
        live = self._work.release(event.attempt)
        failures = self._work.failures[live.shard]
        held = failures.held
        assert held is not None
        self._work.settle(live.shard)
        refuted = held.outcome.doubted.keys() - event.failures.keys()
        if not refuted:
            return self._accept(live.shard, held.attempt, held.outcome, live.card)
        self._cards.record_success(live.card)
        failures.refute(event.failures)
        self._state.try_again(live.shard)
        first = self._state.cards.by_number[held.card]
        return [Discard(held.attempt), *self._cards.count_transient(first, 0, len(refuted))]

    def failed(self, event: ShardFailed) -> list[Decision] | None:
        """Has the shard tried again, and replaces a card that has not made anything since."""
        if event.attempt not in self._work.attempts:
            return None
        live, failure = self._work.release(event.attempt), event.failure
        card = live.card
        failures = self._work.failures.setdefault(live.shard, ShardFailures())
        failures.raised(card.number, failure)
        failures.incidents.append(Incident(card.number, {live.shard}))
        self._state.try_again(live.shard)
        card.consecutive_failures += 1
        decisions: list[Decision] = []
        if not failure.healthy and card.state is CardState.READY:
            decisions += self._cards.replace_or_quarantine(card, failure.error)
        if failure.storage:
            decisions += self._state.storage_failed(card.node, live.shard, failure.error)
        return decisions

    def recall_answered(self, event: RecallAnswered) -> list[Decision] | None:
        """Assigns what was given back to another card."""
        if event.attempt not in self._work.attempts:
            return None
        self._work.answered(event.attempt)
        if event.given_back:
            self._state.put_back(self._work.release(event.attempt).shard)
        return []

    def attempt_ended(self, event: AttemptEnded) -> list[Decision] | None:
        """Lets a card work again that was told to drop an attempt."""
        self._state.backups.dropped(self._state.cards.by_number[event.card], event.attempt)
        return []

    def committed(self, event: ShardCommitted) -> list[Decision] | None:
        """Notes that a shard is committed."""
        if self._state.committing.pop(event.shard, None) is None:
            return None
        self._state.open -= 1
        return []

    def storage_checked(self, event: StorageChecked) -> list[Decision]:
        """Ends the run if storage fails for the driver, too; gives up a shard whose rows can't be read at all."""
        self._state.storage_failures.being_checked = False
        if event.error is not None:
            return self._state.end(event.error)
        failures = self._work.failures.get(event.shard)
        if event.of_shard is not None and failures is not None:
            failures.hopeless, failures.error = True, event.of_shard
            if self._work.take(event.shard):
                self._state.put_back(event.shard)
        return []

    # -- records ------------------------------------------------------------------------------------------------

    def _accept(self, shard: int, attempt: str, outcome: ShardOutcome, maker: Card) -> list[Decision]:
        """Has a record committed; `maker` is the card whose result decided it."""
        state = self._state
        state.committing[shard] = attempt
        state.done_rows += outcome.rows
        state.failed_rows += outcome.failed_rows
        state.raised_rows += outcome.raised_rows
        decisions: list[Decision] = [Commit(shard, attempt)]
        failures = self._work.failures.pop(shard, None)
        at_fault: dict[int, None] = {}
        for incident in failures.incidents if failures else ():
            if incident.made(shard, bool(outcome.raised_rows or outcome.undecoded_rows)):
                at_fault[incident.card] = None
        for number in at_fault:
            decisions += self._cards.made_elsewhere(state.cards.by_number[number], maker)
        state.limit_failed_rows()
        return decisions
