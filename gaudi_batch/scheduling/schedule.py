"""Which card gets which shard next, what is tried again, and who is to blame.

All of the run's decisions are made in this file, and this file knows nothing of Ray, of storage or of the time: the
driver tells it what happened, one method an event, and carries out the decisions that come back. Every corner can
therefore be reached by a test, and a cluster of 10,000 cards be simulated in seconds.

The rules:

* A shard is pending, in hand (one live attempt on one card), held, committing, committed, or stuck. Only a live attempt
  can commit; news of any other attempt changes nothing. So no shard is committed twice, and none is lost.
* Cards pull. Which card gets which shard next is worked out in `dispatch.py`, and which graph key a card goes on with
  in `affinity.py`.
* Which row of a shard is to blame is worked out in `failures.py`. A suspect shard runs apart from others, so that what
  happens there is its doing.
* A failure is the card's fault when others then make all that it had in hand without a failed row. `MAX_VINDICATIONS`
  of those, `MAX_STRIKES` failures in a row, or `MAX_START_FAILURES` starts in a row quarantine the card.
* What several failures say together, of storage, a time limit, a card that paints wrong now and then, or nodes that go
  one after the other, is worked out in `verdicts.py`.
* A shard is stuck when trying it again teaches nothing new: the others go on, and the run ends as stopped.
* A card whose node has announced its end finishes the shard that it has begun and gets no other.
* The run ends: complete, or stopped with a reason. What waits always waits for a card that is up, starting or expected
  of the cluster, and when there is none the run is over. Another may take the place of one that left with its node or
  is quarantined, and is expected until the driver says otherwise; not, though, when every card of two nodes has failed,
  or when node after node was lost before a card of theirs had made anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gaudi_batch.plan import BatchKind, Shard
from gaudi_batch.scheduling.cards import Card, CardState
from gaudi_batch.scheduling.decisions import (
    CheckStorage,
    Commit,
    Decision,
    Discard,
    Finish,
    Quarantine,
    Release,
    Replace,
)
from gaudi_batch.scheduling.dispatch import Dispatch
from gaudi_batch.scheduling.events import Reading, ShardFailure, ShardOutcome, SlowBatch, SlowReading, StorageStalled
from gaudi_batch.scheduling.failures import Held, Incident, Trouble
from gaudi_batch.scheduling.verdicts import NodeLosses, SlowKinds, StorageFailures, TransientFailures

MAX_START_FAILURES = 2
MAX_STRIKES = 6
MAX_VINDICATIONS = 3
ENOUGH_NODES = 2
"""Nodes whose every card must have failed before nothing more is expected of others."""
ALL_FAILED_ROWS = 200
"""A run in which this many rows failed in the pipeline and none was made stops: the job is wrong, not the rows."""


class Schedule:
    """The state of a run.

    Args:
        shards: what is still to be made.
        prefix: what makes this driver's attempts unique over all drivers.
        total_rows: rows of the whole job, of which a share in `max_failed` is taken.
        done_rows: rows that were committed before.
        failed_rows: those among them that failed.
        max_graphs: graph keys whose graphs a card keeps.
        condemned: rows of a shard to record as failed without a try, with the reason.
        max_failed: failed rows beyond which the run stops: a count (int), a share (float), or None.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        prefix: str,
        total_rows: int,
        done_rows: int = 0,
        failed_rows: int = 0,
        max_failed: int | float | None = None,
        max_graphs: int = 16,
        condemned: Mapping[int, Mapping[int, str]] | None = None,
    ) -> None:
        self.shards = {shard.number: shard for shard in shards}
        self.prefix = prefix
        self.total_rows = total_rows
        self.done_rows = done_rows
        self.failed_rows = failed_rows
        self.max_failed = max_failed
        self.retries = 0
        self.stop_reason: str | None = None
        self.finished = False
        self.stuck: dict[int, str] = {}
        self.last_error = ""
        """Why a card failed last."""
        self._open = len(self.shards)  # shards neither committed nor stuck
        self._committing: dict[int, str] = {}
        self._work = Dispatch(self.shards, prefix, max_graphs)
        self._raised_rows = 0
        self._storage_failures = StorageFailures()
        self._slow_kinds = SlowKinds()
        self._transient_failures = TransientFailures()
        self._node_losses = NodeLosses()
        self._more_to_come = False
        for number, rows in (condemned or {}).items():
            self._work.troubles[number] = Trouble(condemned=dict(rows))

    # -- events: cards ------------------------------------------------------------------------------------------

    def starting(self, number: int, node: str = "") -> list[Decision]:
        """A card's process is being started for the first time, on this node."""
        card = Card(number, node)
        self._work.cards.add(card)
        self._node_losses.started(card)
        self._set_state(card, CardState.STARTING)
        return []

    def ready(self, number: int, node: str | None = None) -> list[Decision]:
        """A card has loaded its pipeline.

        Args:
            number: which card.
            node: where it is now, if the cluster may have moved its place since it was started.
        """
        card = self._work.cards.by_number[number]
        if card.state is not CardState.STARTING:
            return []
        if node is not None and node != card.node:
            self._work.cards.move(card, node)
            card.strikes = card.start_failures = card.vindications = card.images = card.transient_failures = 0
        self._set_state(card, CardState.READY)
        return self._proceed()

    def refused(self, number: int, error: str) -> list[Decision]:
        """A card that has loaded may make nothing of this run, and no other process in its place may."""
        card = self._work.cards.by_number[number]
        if card.state not in (CardState.STARTING, CardState.READY):
            return []
        self.last_error = error
        return self._quarantine(card, error) + self._proceed()

    def died(
        self, number: int, error: str, slow: SlowBatch | SlowReading | StorageStalled | None = None
    ) -> list[Decision]:
        """A card's process ended, or was killed for passing a limit, and its node is still there.

        Args:
            number: which card.
            error: how it died.
            slow: what it was killed for: storage that stalled, a reading that took too long, or a batch, if no card
                has made one of its kind. That says nothing of a row.
        """
        card = self._work.cards.by_number[number]
        stalled: list[int] = []
        if card.state is CardState.STARTING:
            card.start_failures += 1
        elif card.state is CardState.READY:
            card.strikes += 1
            if isinstance(slow, SlowBatch) and self._slow_kinds.cut(card, slow, self._work.cards):
                for shard in self._work.take_kind(slow.kind):
                    self._put_back(shard)
            if isinstance(slow, StorageStalled):
                stalled = [self._work.attempts[attempt].shard for attempt in card.hand][:1] or [next(iter(self.shards))]
            self._blame_death(card, error, slow is not None)
        elif card.state is CardState.LEAVING:
            return [Release(number), *self.gone(number)]
        else:
            return []
        decisions = self._replace_or_quarantine(card, error)
        for shard in stalled:
            decisions += self._blame_storage(card, shard, error)
        return decisions + self._proceed()

    def broken(self, number: int, error: str, storage: bool = False) -> list[Decision]:
        """A card's process says that it can't go on: it could not load its pipeline, or its device failed.

        Args:
            number: which card.
            error: why.
            storage: whether storage went on failing while it loaded, which says little of the card.
        """
        card = self._work.cards.by_number[number]
        if storage and card.state is CardState.STARTING:
            card.strikes += 1
            decisions = self._replace_or_quarantine(card, error)
            return decisions + self._blame_storage(card, next(iter(self.shards)), error) + self._proceed()
        if card.state is CardState.READY and not card.proven:
            card.start_failures += 1
        return self.died(number, error)

    def gone(self, number: int) -> list[Decision]:
        """A card left with its node; that counts against no card. Where it was not announced, it counts for the shards
        in its hand."""
        card = self._work.cards.by_number[number]
        if card.state in (CardState.STARTING, CardState.READY):
            self._lose_node(card)
        self._set_state(card, CardState.GONE)
        return self._proceed()

    def leaving(self, number: int) -> list[Decision]:
        """A card's node has announced its end: the card finishes what it has begun and gets nothing more."""
        card = self._work.cards.by_number[number]
        if card.state not in (CardState.STARTING, CardState.READY):
            return []
        asked_back = self._work.recall_queued_of(card)
        self._work.drop_reservation(card)
        card.state = CardState.LEAVING
        self._work.cards.file(card)
        return [*asked_back, *self._proceed()]

    def expect(self, more: bool) -> list[Decision]:
        """Whether the cluster may yet give cards, by a look at it since one was lost. While it may, a run without cards
        waits."""
        self._more_to_come = more
        return self._proceed()

    # -- events: attempts ---------------------------------------------------------------------------------------

    def begun(self, attempt: str, generating: bool) -> list[Decision]:
        """A card has begun to read a shard, or to make it."""
        live = self._work.attempts.get(attempt)
        if live is not None:
            live.begun = True
            live.generating = live.generating or generating
        return []

    def reading(self, attempt: str, reading: Reading) -> list[Decision]:
        """A card is about to decode rows of a suspect shard."""
        live = self._work.attempts.get(attempt)
        if live is not None:
            live.at = reading
        return []

    def announced(self, attempt: str, rows: Iterable[int]) -> list[Decision]:
        """A card is about to call the pipeline for these rows of a suspect shard."""
        live = self._work.attempts.get(attempt)
        if live is not None:
            if isinstance(live.at, frozenset):
                self._prove(live.card)  # it has made the batch before
            live.at = frozenset(rows)
            self._work.settle(live.shard)
            return self._proceed()
        return []

    def done(self, attempt: str, outcome: ShardOutcome) -> list[Decision]:
        """A card has made a shard and returned its record."""
        if attempt not in self._work.attempts:
            return []
        live = self._work.release(attempt)
        card, images = live.card, self.shards[live.shard].images
        self._work.affinity.took(outcome.seconds, images, live.captures)
        self._storage_failures.works()
        self._prove(card)
        card.vindications = max(0, card.vindications - 1)
        self._work.settle(live.shard)
        self._lift(self.shards[live.shard].bucket.batch_kind)
        decisions = self._count_transient(card, images, outcome.transient_failures)
        if outcome.doubted:
            self._work.troubles.setdefault(live.shard, Trouble()).hold(Held(attempt, card.number, outcome))
            self._put_back(live.shard)
        else:
            decisions += self._accept(live.shard, attempt, outcome, card)
        return decisions + self._proceed()

    def confirmed(self, attempt: str, failures: Mapping[int, str]) -> list[Decision]:
        """A card has made the doubted rows of a held record alone; `failures` are those that failed on it, too."""
        if attempt not in self._work.attempts:
            return []
        live = self._work.release(attempt)
        trouble = self._work.troubles[live.shard]
        held = trouble.held
        assert held is not None
        self._work.settle(live.shard)
        refuted = held.outcome.doubted.keys() - failures.keys()
        if not refuted:
            return self._accept(live.shard, held.attempt, held.outcome, live.card) + self._proceed()
        self._prove(live.card)
        trouble.refute(failures)
        self.retries += 1
        self._put_back(live.shard)
        first = self._work.cards.by_number[held.card]
        return [Discard(held.attempt), *self._count_transient(first, 0, len(refuted)), *self._proceed()]

    def failed(self, attempt: str, failure: ShardFailure) -> list[Decision]:
        """A card could not make a shard, and its process lives."""
        if attempt not in self._work.attempts:
            return []
        live = self._work.release(attempt)
        card = live.card
        trouble = self._work.troubles.setdefault(live.shard, Trouble())
        trouble.raised(card.number, failure)
        trouble.incidents.append(Incident(card.number, {live.shard}))
        self._try_again(live.shard)
        card.strikes += 1
        decisions: list[Decision] = []
        if not failure.healthy and card.state is CardState.READY:
            decisions += self._replace_or_quarantine(card, failure.error)
        if failure.storage:
            decisions += self._blame_storage(card, live.shard, failure.error)
        return decisions + self._proceed()

    def recalled(self, attempt: str, given_back: bool) -> list[Decision]:
        """A card has answered a recall: it had not begun the shard and gave it back, or it keeps it."""
        if attempt not in self._work.attempts:
            return []
        self._work.answered(attempt)
        if given_back:
            self._put_back(self._work.release(attempt).shard)
        return self._proceed()

    def committed(self, shard: int) -> list[Decision]:
        """The manifest of a shard is in place, from this driver or from another."""
        if self._committing.pop(shard, None) is None:
            return []
        self._open -= 1
        return self._proceed()

    def storage_checked(self, shard: int, error: str | None, of_shard: str | None = None) -> list[Decision]:
        """The driver has looked at storage itself, as `CheckStorage` asked.

        Args:
            shard: the shard whose rows it has read.
            error: how storage failed for it, if it did.
            of_shard: how these rows alone failed, if they did: no card can make the shard.
        """
        self._storage_failures.being_checked = False
        if error is not None:
            return self._end(error)
        trouble = self._work.troubles.get(shard)
        if of_shard is not None and trouble is not None:
            trouble.hopeless, trouble.error = True, of_shard
            if self._work.take(shard):
                self._put_back(shard)
        return self._proceed()

    def stop(self, reason: str) -> list[Decision]:
        """Take up no more work; what has begun is finished."""
        self.stop_reason = self.stop_reason or reason
        return self._proceed()

    # -- what a reader may ask ----------------------------------------------------------------------------------

    def state(self, number: int) -> CardState:
        """Where a card is in its life; one that this schedule has not heard of waits for the cluster."""
        card = self._work.cards.by_number.get(number)
        return card.state if card is not None else CardState.WAITING

    def is_live(self, attempt: str) -> bool:
        """Whether an attempt may still commit."""
        return attempt in self._work.attempts

    def pending(self) -> int:
        """Shards that no card has."""
        return self._work.waiting()

    def usable(self) -> int:
        """Cards that are ready or starting."""
        return self._work.cards.usable()

    def useful(self) -> int:
        """Cards that would have something to do, those that are usable among them."""
        return self._work.useful()

    # -- decisions ----------------------------------------------------------------------------------------------

    def _proceed(self) -> list[Decision]:
        if self.finished:
            return []
        decisions = self._release_leaving()
        if self.stop_reason is None:
            decisions += self._work.next()
        else:
            decisions += self._work.recall_all()
        hopeless = not self.usable() and not (self._more_to_come and self._may_hope())
        over = self._open == 0 or self.stop_reason is not None or hopeless
        if over and not self._work.attempts and not self._committing:
            self.finished = True
            decisions.append(Finish(self._why_it_ended()))
        return decisions

    def _end(self, reason: str) -> list[Decision]:
        """The run ends at once: what has begun can't come to a good end."""
        if self.finished:
            return []
        self.stop_reason = self.stop_reason or reason
        self.finished = True
        return [Finish(self.stop_reason)]

    def _may_hope(self) -> bool:
        """Whether another card may do better: not if every one so far failed, and that on several nodes, nor if one
        node after the other was lost."""
        there = [card for card in self._work.cards.by_number.values() if card.state is not CardState.GONE]
        failed = all(card.state is CardState.QUARANTINED for card in there)
        return not self._node_losses.hopeless and (not failed or len({card.node for card in there}) < ENOUGH_NODES)

    def _release_leaving(self) -> list[Decision]:
        free = list(self._work.cards.leaving_idle.values())
        for card in free:
            self._set_state(card, CardState.GONE)
        return [Release(card.number) for card in free]

    def _why_it_ended(self) -> str | None:
        if self._open == 0 and not self.stuck:
            return None
        if self.stop_reason is not None:
            return self.stop_reason
        if self._node_losses.hopeless:
            return f"{self._node_losses.fruitless} nodes in a row were lost before a card of theirs had made anything"
        if self._open:
            return f"no card is left; the last error of one: {self.last_error or 'none'}"
        if self._slow_kinds.set_aside:
            return f"{next(iter(self._slow_kinds.set_aside.values()))}; {len(self.stuck)} shards are not made"
        shard, error = next(iter(self.stuck.items()))
        return f"{len(self.stuck)} shards could not be made; shard {shard}: {error}"

    # -- records ------------------------------------------------------------------------------------------------

    def _accept(self, shard: int, attempt: str, outcome: ShardOutcome, maker: Card) -> list[Decision]:
        """A record is to be committed; `maker` is who had the last word on it."""
        self._committing[shard] = attempt
        self.done_rows += outcome.rows
        self.failed_rows += outcome.failed_rows
        self._raised_rows += outcome.raised_rows
        decisions: list[Decision] = [Commit(shard, attempt)]
        trouble = self._work.troubles.pop(shard, None)
        at_fault: dict[int, None] = {}
        for incident in trouble.incidents if trouble else ():
            if incident.made(shard, bool(outcome.raised_rows or outcome.undecoded_rows)):
                at_fault[incident.card] = None
        for number in at_fault:
            decisions += self._made_elsewhere(self._work.cards.by_number[number], maker)
        self._limit_failures()
        return decisions

    def _limit_failures(self) -> None:
        limit = self.max_failed
        if limit is not None and self.failed_rows > (limit if isinstance(limit, int) else limit * self.total_rows):
            self.stop_reason = (
                self.stop_reason
                or f"{self.failed_rows} rows failed, more than max_failed ({limit}); a larger one goes on"
            )
        elif self._raised_rows >= ALL_FAILED_ROWS and self.failed_rows == self.done_rows:
            self.stop_reason = self.stop_reason or f"the first {self._raised_rows} rows that were tried all failed"

    # -- failures -----------------------------------------------------------------------------------------------

    def _blame_death(self, card: Card, error: str, no_row: bool) -> None:
        """A card's process died; `no_row` says that this was no row's doing."""
        hand = list(card.hand)
        # It may still store one shard while it makes the next.
        generating = [attempt for attempt in hand if self._work.attempts[attempt].generating]
        at_work = (generating[-1:] or hand[:1] or [""])[0]
        shards = {self._work.attempts[attempt].shard for attempt in hand}
        explained = any(self._work.row_groups.by_row(self.shards[shard]) for shard in shards)
        incident = Incident(card.number, set() if explained else shards)
        for attempt in reversed(hand):
            live = self._work.release(attempt)
            trouble = self._work.troubles.setdefault(live.shard, Trouble())
            trouble.incidents.append(incident)
            if attempt == at_work:
                others = self._work.cards.others({*trouble.died_on, card.number})
                at = None if no_row else live.at
                trouble.died(card.number, error, at, others)
                if isinstance(at, Reading):
                    self._blame_reading(trouble, self.shards[live.shard], at, others)
                self._try_again(live.shard)
            else:
                # It may have been read or stored at that moment, or not have begun.
                trouble.announce = True
                self._put_back(live.shard)

    def _blame_reading(self, trouble: Trouble, shard: Shard, at: Reading, others: bool) -> None:
        """A process died decoding rows that it had announced."""
        if self._work.row_groups.killed(shard, at):
            trouble.learnt()
            self._work.reconsider()
            for number, other in self._work.troubles.items():
                if self._work.row_groups.by_row(self.shards[number]):
                    other.explain()  # it may have been this group that others died of
        nodes = {self._work.cards.by_number[number].node for number in trouble.died_on}
        other_nodes = bool(self._work.cards.usable_on.keys() - nodes)
        if at.by_row and trouble.is_certain_of_reading(others) and (len(nodes) > 1 or not other_nodes):
            reason = "the card's process died reading this row, or one before it in row group"
            self._work.row_groups.condemn(shard, at, f"{reason} {at.group}: {trouble.error}")
            trouble.learnt()

    def _lose_node(self, card: Card) -> None:
        """A card's node went without notice, and with it all its other cards."""
        self._work.keep_off(card.node)
        self._node_losses.lost(card)
        for attempt in reversed(list(card.hand)):
            live = self._work.release(attempt)
            if live.begun:
                trouble = self._work.troubles.setdefault(live.shard, Trouble())
                self.retries += trouble.alone_on_node
                others = self._work.cards.others({*trouble.died_on, card.number})
                alone = trouble.alone_on_node
                trouble.lost_with_node(card.number, live.at, others)
                if alone and isinstance(live.at, Reading):
                    self._blame_reading(trouble, self.shards[live.shard], live.at, others)
            self._put_back(live.shard)

    def _try_again(self, shard: int) -> None:
        self.retries += 1
        self._put_back(shard)

    def _put_back(self, shard: int) -> None:
        """A shard waits again, before those that have not been tried, unless that has become useless."""
        kind = self.shards[shard].bucket.batch_kind
        trouble = self._work.troubles.get(shard)
        if kind in self._slow_kinds.set_aside:
            self._give_up(shard, self._slow_kinds.set_aside[kind])
        elif trouble is not None and trouble.stuck:
            self._give_up(shard, trouble.error)
        else:
            self._work.put_back(shard)

    def _give_up(self, shard: int, reason: str) -> None:
        self.stuck[shard] = reason
        self._open -= 1
        self._work.settle(shard)

    def _lift(self, kind: BatchKind) -> None:
        """A card has made a kind of batch after all that was set aside."""
        reason = self._slow_kinds.set_aside.pop(kind, None)
        if reason is not None:
            for shard in [shard for shard, said in self.stuck.items() if said == reason]:
                del self.stuck[shard]
                self._open += 1
                self._put_back(shard)

    def _blame_storage(self, card: Card, shard: int, error: str) -> list[Decision]:
        """Storage failed for a card, which may be its node's fault."""
        failures = self._storage_failures
        if failures.failed(card.node, self._work.cards.usable_on.keys()):
            return self._end(error)
        if failures.being_checked:
            return []
        failures.being_checked = True
        return [CheckStorage(self.shards[shard])]

    def _replace_or_quarantine(self, card: Card, error: str) -> list[Decision]:
        self.last_error = error
        if card.start_failures >= MAX_START_FAILURES:
            return self._quarantine(card, f"it made nothing in {card.start_failures} starts: {error}")
        if card.strikes >= MAX_STRIKES:
            return self._quarantine(card, f"it failed {card.strikes} times in a row: {error}")
        self._set_state(card, CardState.STARTING)
        return [Replace(card.number)]

    def _made_elsewhere(self, card: Card, maker: Card) -> list[Decision]:
        if card is maker or card.state not in (CardState.STARTING, CardState.READY):
            return []
        card.vindications += 1
        if card.vindications < MAX_VINDICATIONS:
            return []
        return self._quarantine(card, f"{card.vindications} shards that it failed were made by other cards")

    def _count_transient(self, card: Card, images: int, failures: int) -> list[Decision]:
        """A card has made images, of which some failed and worked when they were made again."""
        self._transient_failures.add(card, images, failures)
        reason = None
        if failures and card.state is CardState.READY:
            reason = self._transient_failures.verdict(card, self._work.cards.usable())
        if reason is None or not self._work.cards.others({card.number}):
            return []  # what is right the second time is better than nothing
        return self._quarantine(card, reason)

    def _quarantine(self, card: Card, reason: str) -> list[Decision]:
        self._set_state(card, CardState.QUARANTINED)
        return [Quarantine(card.number, reason)]

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def _prove(self, card: Card) -> None:
        card.proven = card.has_made = True
        card.strikes = card.start_failures = 0
        self._node_losses.made()

    def _set_state(self, card: Card, state: CardState) -> None:
        """Moves a card on. Only a ready card has work in hand and graphs captured."""
        card.state = state
        if state is not CardState.READY:
            for attempt in reversed(list(card.hand)):
                self._put_back(self._work.release(attempt).shard)
            self._work.drop_reservation(card)
            self._work.affinity.forget(card.number)
            card.proven = False
        self._more_to_come |= state in (CardState.GONE, CardState.QUARANTINED)
        self._work.cards.file(card)
