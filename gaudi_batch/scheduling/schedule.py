"""Which card gets which shard next, what is tried again, and which cards may work.

All of the run's decisions are made in this room, but for one: the driver's watchdog kills what passes a time limit. The
room knows nothing of Ray, of storage or of a clock. The driver tells it what happened (`events.py`) and carries out
what comes back (`decisions.py`). So every corner can be reached by a test, a cluster of 10,000 cards can be simulated
in seconds, and the events of a real run can be replayed.

The rules:

* A shard is pending, in flight (a live attempt on one card, or on two), held, committing, committed, or stuck. Only a
  live attempt can commit; events of any other attempt change nothing. So no shard is committed twice, and none is lost.
* Cards pull. Which card gets which shard next is worked out in `dispatch.py`, and which graph key a card goes on with
  in `affinity.py`.
* The life of a card is a table, `cards.TRANSITIONS`. What moves it on is in `card_events.py`, which cards may work in
  `admission.py`, how many are asked for in `capacity.py`.
* Which row of a shard is at fault is worked out in `failures.py`. A suspect shard runs apart from others, so that what
  happens there is its doing.
* A failure is the card's fault when others then make all that it had in flight without a failed row. A card is
  quarantined after `MAX_SHARDS_MADE_ELSEWHERE` of those, `MAX_CONSECUTIVE_FAILURES` failures in a row, or
  `MAX_START_FAILURES` starts in a row.
* What several failures say together, of storage, a time limit, a card that paints wrong now and then, or nodes that go
  one after the other, is worked out in `verdicts.py`.
* When nothing is pending, a shard that would end later where it is than on an idle card gets a second attempt there
  (`backups.py`). The first that is made is committed, and the card of the other drops it.
* A shard is stuck when trying it again shows nothing new: the others go on, and the run ends as stopped.
* A card whose node has announced its end finishes the shard that it has begun and gets no other. In a run that stops
  all do, and a card that has begun nothing is given back.
* The run ends: complete, or stopped with a reason. What waits always waits for a card that is up, starting or expected
  of the cluster, and when there is none the run is over. Another may take the place of one that left with its node or
  is quarantined, and is expected until the cluster is seen to give none; not, though, when every card of two nodes has
  failed, or when node after node was lost before a card of theirs had made anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from gaudi_batch.plan import Shard
from gaudi_batch.scheduling import events
from gaudi_batch.scheduling.card_events import CardEvents
from gaudi_batch.scheduling.cards import Card, CardState
from gaudi_batch.scheduling.decisions import Decision, Finish
from gaudi_batch.scheduling.shard_events import ShardEvents
from gaudi_batch.scheduling.state import RowCounts, Rules, RunState

MAX_REASONS = 3
"""Reasons that the end of a run names."""


class Schedule:
    """The decisions of a run.

    Args:
        shards: what is still to be made.
        prefix: what makes this driver's attempts unique over all drivers.
        rows: the rows of the run.
        rules: what the job says.
        failed_rows: rows of a shard to record as failed without a try, with the reason.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        prefix: str,
        rows: RowCounts,
        rules: Rules | None = None,
        failed_rows: Mapping[int, Mapping[int, str]] | None = None,
    ) -> None:
        self.prefix = prefix
        self._state = RunState(shards, prefix, rows, rules or Rules(), failed_rows or {})
        self._work = self._state.work
        self._cards = CardEvents(self._state)
        self._shards = ShardEvents(self._state, self._cards)
        self._handlers = self._table()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handlers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._handlers = self._table()

    def _table(self) -> Mapping[type, Callable[[Any], list[Decision] | None]]:
        """The handler of each event."""
        return {
            events.ClusterSeen: self._cards.seen,
            events.CardPlaced: self._cards.placed,
            events.CardLoaded: self._cards.loaded,
            events.CardDied: self._cards.died,
            events.CardBroken: self._cards.broken,
            events.CardGone: self._cards.gone,
            events.CardLeaving: self._cards.leaving,
            events.ShardBegun: self._shards.begun,
            events.ReadingAnnounced: self._shards.reading,
            events.BatchAnnounced: self._shards.batch,
            events.ShardMade: self._shards.made,
            events.DoubtsChecked: self._shards.doubts_checked,
            events.ShardFailed: self._shards.failed,
            events.RecallAnswered: self._shards.recall_answered,
            events.AttemptEnded: self._shards.attempt_ended,
            events.ShardCommitted: self._shards.committed,
            events.StorageChecked: self._shards.storage_checked,
            events.RaySilent: self._ray_silent,
            events.TimePassed: self._time_passed,
            events.StopRequested: self._stop_requested,
            events.StopForced: self._ended,
            events.RunFailed: self._ended,
        }

    def handle(self, event: events.Event) -> list[Decision]:
        """Takes in an event; returns the decisions. After `Finish` there are none."""
        if self._state.finished:
            return []
        now = getattr(event, "now", None)
        if now is not None:
            self._state.now = max(self._state.now, now)
        decisions = self._handlers[type(event)](event)
        if decisions is None or self._state.finished:
            return decisions or []
        return decisions + self._cards.admit() + self._proceed()

    # -- what a reader may ask ----------------------------------------------------------------------------------

    @property
    def shards(self) -> Mapping[int, Shard]:
        """The shards that were missing when this driver began, by number."""
        return self._state.shards

    @property
    def stuck(self) -> Mapping[int, str]:
        """Shards that are not tried any more, with the reasons."""
        return self._state.stuck

    @property
    def done_rows(self) -> int:
        """Rows that are made or were before, including those that failed."""
        return self._state.done_rows

    @property
    def failed_rows(self) -> int:
        """How many of the done rows failed."""
        return self._state.failed_rows

    @property
    def retries(self) -> int:
        """Attempts that failed."""
        return self._state.retries

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self._state.finished

    @property
    def stop_reason(self) -> str | None:
        """Why the run begins no more work; None while it does."""
        return self._state.stop_reason

    def state(self, number: int) -> CardState:
        """The state of a card's life; a card that the cluster has not placed is waiting."""
        return self._state.cards.state(number)

    def shard_of(self, attempt: str) -> int | None:
        """The shard of an attempt that may still commit; None of any other."""
        live = self._work.attempts.get(attempt)
        return None if live is None else live.shard

    @property
    def committing(self) -> Collection[int]:
        """The shards that are made and whose commit is under way."""
        return self._state.committing

    def is_live(self, attempt: str) -> bool:
        """Whether an attempt may still commit."""
        return attempt in self._work.attempts

    def is_waiting_for_time(self) -> bool:
        """Whether the passing of time alone may lead to a decision."""
        return self._state.stop_reason is None and self._state.backups.is_waiting()

    def pending(self) -> int:
        """How many shards no card has."""
        return self._work.count_pending()

    # -- the run ------------------------------------------------------------------------------------------------

    def _ray_silent(self, event: events.RaySilent) -> list[Decision] | None:
        timeout = self._state.rules.cluster_timeout_s
        if event.seconds <= timeout:
            return None
        return self._ended(events.RunFailed(f"Ray has not answered for {timeout:g} s (limits.cluster)"))

    def _time_passed(self, _: events.TimePassed) -> list[Decision]:
        return []  # what follows from the time is worked out after each event

    def _stop_requested(self, event: events.StopRequested) -> list[Decision]:
        self._state.stop(event.reason)
        return []

    def _ended(self, event: events.StopForced | events.RunFailed) -> list[Decision]:
        self._state.finished = True
        return [Finish(event.reason)]

    def _proceed(self) -> list[Decision]:
        """Assigns what can be assigned now, and ends the run when there is nothing to wait for."""
        state = self._state
        decisions = self._cards.release_leaving()
        if state.stop_reason is None:
            decisions += self._work.next()
            decisions += self._state.backups.next(self._state.now)
        else:
            decisions += self._work.recall_all()
            decisions += self._cards.release_idle()
        over = state.open == 0 or state.stop_reason is not None or self._cards.capacity.is_hopeless()
        if over and not self._work.attempts and not state.committing:
            state.finished = True
            decisions.append(Finish(self._why_it_ended()))
        return decisions

    def _why_it_ended(self) -> str | None:
        state = self._state
        if state.open == 0 and not state.stuck:
            return None
        if state.stop_reason is not None:
            return state.stop_reason
        if state.node_losses.hopeless:
            return f"{state.node_losses.fruitless} nodes in a row were lost before a card of theirs had made anything"
        if state.open:
            return f"no card is left; the last error of one: {state.last_error or 'none'}"
        if reasons := state.unmade.reasons:
            more = f"; and {len(reasons) - MAX_REASONS} more such" if len(reasons) > MAX_REASONS else ""
            return f"{'; '.join(reasons[:MAX_REASONS])}{more}; {len(state.stuck)} shards are not made"
        shard, error = next(iter(state.stuck.items()))
        return f"{len(state.stuck)} shards could not be made; shard {shard}: {error}"

    # -- invariants ---------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises AssertionError if parts of the state contradict each other. It takes longer with more shards and
        cards; tests call it after each event."""
        state, work, cards = self._state, self._work, self._state.cards
        attempts_on_node = [live.shard for live in work.attempts.values()]
        pending = work.unassigned()
        doubles = Counter(attempts_on_node)
        assert max(doubles.values(), default=0) <= 2, "a shard has more than one backup"
        for shard in [shard for shard, count in doubles.items() if count > 1]:
            on_cards = {live.card.number for live in work.attempts.values() if live.shard == shard}
            assert len(on_cards) == 2, "both attempts at a shard are on one card"
        everywhere = [*doubles, *pending, *state.committing, *state.stuck]
        assert len(everywhere) == len(set(everywhere)), "a shard is in two places"
        assert set(everywhere) <= state.shards.keys(), "a shard is not of this run"
        assert state.open == len(everywhere) - len(state.stuck), "shards are lost or counted twice"
        held = [attempt for card in cards.by_number.values() for attempt in card.in_flight]
        assert sorted(held) == sorted(work.attempts), "an attempt is on no card, or on two"
        for attempt, live in work.attempts.items():
            assert attempt in live.card.in_flight, "an attempt is on another card than it says"
        for card in cards.by_number.values():
            self._validate_card(card)
        for number in cards.unplaced:
            assert number not in cards.by_number, "a card waits for the place that it has"
        reserved = [card.reserved_for for card in cards.by_number.values() if card.reserved_for is not None]
        assert len(reserved) == len(set(reserved)), "two cards are kept for one shard"

    def _validate_card(self, card: Card) -> None:
        if card.in_flight:
            assert card.state in (CardState.READY, CardState.LEAVING), f"a card that is {card.state.value} has work"
        if card.state is CardState.READY:
            assert card.loaded is not None, "a card works that has not loaded"
        if card.suspect:
            assert len(card.in_flight) == 1, "a suspect shard is in flight beside another"
