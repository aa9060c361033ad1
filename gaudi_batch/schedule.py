"""Which card gets which shard next, what is tried again, and who is to blame.

All of the run's decisions are made in this file, and this file knows nothing of Ray, of storage or of the time: the
driver tells it what happened, one method an event, and carries out the decisions that come back. Every corner can
therefore be reached by a test, and a cluster of 10,000 cards be simulated in seconds.

The rules:

* A shard is pending, in hand (one live attempt on one card), committing, committed, or stuck. Only a live attempt can
  commit; news of any other attempt changes nothing. So no shard is committed twice, and none is lost.
* Cards pull. A card holds at most `QUEUE` shards, so that it never waits for the next one; it gets the second only
  while there are more shards than cards without one. A queued shard that has not begun is recalled as soon as a card
  that may have it has nothing to do.
* Which graph key a card goes on with is worked out in `affinity.py`.
* A shard whose card died or raised goes elsewhere if any other card is left that has not failed it; after two cards it
  no longer waits for one that starts.
* Which row of a shard is to blame is worked out in `blame.py`. A failure is the card's fault when its shard then
  succeeds elsewhere without a failed row: `MAX_VINDICATIONS` of those, `MAX_STRIKES` failures in a row, or
  `MAX_START_FAILURES` starts in a row quarantine the card.
* A shard is stuck when trying it again teaches nothing new: the others go on, and the run ends as stopped.
* A card whose node has announced its end finishes the shard that it has begun and gets no other.
* The run ends: complete, or stopped with a reason. What waits always waits for a card that is up, starting or expected
  of the cluster, and when there is none the run is over. Another may take the place of one that left with its node or
  is quarantined, and is expected until the driver says otherwise; not, though, when every card of two nodes has failed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from gaudi_batch.affinity import Affinity
from gaudi_batch.blame import Trouble
from gaudi_batch.decisions import Assign, Commit, Decision, Finish, Quarantine, Recall, Release, Replace
from gaudi_batch.plan import GraphKey, Shard

QUEUE = 2
"""Shards in one card's hand: the one that it works on and the one after."""
MAX_START_FAILURES = 2
MAX_STRIKES = 6
MAX_VINDICATIONS = 3
ENOUGH_NODES = 2
"""Nodes whose every card must have failed before nothing more is expected of others."""
ENOUGH_CARDS = 2
"""Cards that must have failed a shard before it is tried on one of them again while others start."""
ALL_FAILED_ROWS = 200
"""A run whose first this many rows all failed stops: the job is wrong, not the rows."""


class CardState(Enum):
    """Where a card is in its life."""

    WAITING = "waiting for the cluster"
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    QUARANTINED = "quarantined"
    GONE = "gone"


@dataclass
class _Card:
    number: int
    node: str
    state: CardState = CardState.GONE
    hand: dict[str, None] = field(default_factory=dict)  # attempts, oldest first
    proven: bool = False  # has made a batch since its process began
    strikes: int = 0  # failures in a row
    start_failures: int = 0  # processes in a row that could not make a batch, by their own word
    vindications: int = 0  # shards that it failed and others made


@dataclass
class _Attempt:
    shard: int
    card: _Card
    captures: bool  # whether its graph key is new to the card
    announced: frozenset[int] | None = None
    recallable: bool = True


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
        self._open = len(self.shards)  # shards neither committed nor stuck
        self._again: deque[int] = deque()  # pending shards that come back, tried before fresh ones
        self._fresh: dict[GraphKey, deque[int]] = {}
        self._fresh_count = len(self.shards)
        self._trouble: dict[int, Trouble] = {}
        self._attempts: dict[str, _Attempt] = {}
        self._committing: dict[int, str] = {}
        self._cards: dict[int, _Card] = {}
        # Where each card is filed, so that an event costs the same with ten cards or ten thousand: those that start,
        # those that leave, and those that are ready by the number of shards in their hand.
        self._starting: dict[int, _Card] = {}
        self._holding: list[dict[int, _Card]] = [{} for _ in range(QUEUE + 1)]
        self._leaving: dict[int, _Card] = {}
        self._affinity = Affinity(max_graphs)
        self._queued: dict[str, _Attempt] = {}  # behind another in its card's hand, and not asked back yet
        self._asked_back: set[str] = set()  # asked back and not answered
        self._sent = 0
        self.last_error = ""
        """Why a card failed last."""
        self._more_to_come = False
        for number, rows in (condemned or {}).items():
            self._trouble[number] = Trouble(condemned=dict(rows))
        for shard in sorted(self.shards.values(), key=lambda shard: shard.number):
            self._fresh.setdefault(shard.bucket.graph_key, deque()).append(shard.number)

    # -- events: cards ------------------------------------------------------------------------------------------

    def starting(self, number: int, node: str = "") -> list[Decision]:
        """A card's process is being started for the first time, on this node."""
        self._cards[number] = _Card(number, node)
        self._set_state(self._cards[number], CardState.STARTING)
        return []

    def ready(self, number: int) -> list[Decision]:
        """A card has loaded its pipeline."""
        card = self._cards[number]
        if card.state is not CardState.STARTING:
            return []
        self._set_state(card, CardState.READY)
        return self._proceed()

    def refused(self, number: int, error: str) -> list[Decision]:
        """A card that has loaded may make nothing of this run, and no other process in its place may."""
        card = self._cards[number]
        if card.state is not CardState.STARTING:
            return []
        self.last_error = error
        return self._quarantine(card, error) + self._proceed()

    def died(self, number: int, error: str) -> list[Decision]:
        """A card's process ended, or was killed for passing a limit, and its node is still there."""
        card = self._cards[number]
        if card.state is CardState.STARTING:
            card.start_failures += 1
        elif card.state is CardState.READY:
            card.strikes += 1
            self._blame_death(card, error)
        elif card.state is CardState.LEAVING:
            return [Release(number), *self.gone(number)]
        else:
            return []
        return self._replace_or_quarantine(card, error) + self._proceed()

    def broken(self, number: int, error: str) -> list[Decision]:
        """A card's process says that it can't go on: it could not load its pipeline, or its device failed."""
        card = self._cards[number]
        if card.state is CardState.READY and not card.proven:
            card.start_failures += 1
        return self.died(number, error)

    def gone(self, number: int) -> list[Decision]:
        """A card left with its node; that counts against nobody."""
        self._set_state(self._cards[number], CardState.GONE)
        return self._proceed()

    def leaving(self, number: int) -> list[Decision]:
        """A card's node has announced its end: the card finishes what it has begun and gets nothing more."""
        card = self._cards[number]
        if card.state not in (CardState.STARTING, CardState.READY):
            return []
        asked_back = [self._recall(attempt) for attempt in card.hand if attempt in self._queued]
        card.state = CardState.LEAVING
        self._file(card)
        return [*asked_back, *self._proceed()]

    def expect(self, more: bool) -> list[Decision]:
        """Whether the cluster may yet give cards, by a look at it since one was lost. While it may, a run without cards
        waits."""
        self._more_to_come = more
        return self._proceed()

    # -- events: attempts ---------------------------------------------------------------------------------------

    def announced(self, attempt: str, rows: Iterable[int]) -> list[Decision]:
        """A card is about to call the pipeline for these rows."""
        live = self._attempts.get(attempt)
        if live is not None:
            if live.announced is not None:
                self._prove(live.card)  # it has made the batch before
            live.announced = frozenset(rows)
        return []

    def done(self, attempt: str, rows: int, failed_rows: int, raised_rows: int, seconds: float = 0.0) -> list[Decision]:
        """A card has made a shard and returned its record.

        Args:
            attempt: the attempt.
            rows: rows in the record.
            failed_rows: those that failed, for whatever reason.
            raised_rows: those that failed in the pipeline, which clears the cards that failed the shard before.
            seconds: how long its pipeline calls took.
        """
        if attempt not in self._attempts:
            return []
        live = self._release(attempt)
        self._affinity.took(seconds, self.shards[live.shard].images, live.captures)
        self._committing[live.shard] = attempt
        self._prove(live.card)
        live.card.vindications = max(0, live.card.vindications - 1)
        self.done_rows += rows
        self.failed_rows += failed_rows
        decisions: list[Decision] = [Commit(live.shard, attempt)]
        trouble = self._trouble.pop(live.shard, None)
        if trouble is not None and not raised_rows:
            for number in dict.fromkeys(trouble.failed_on):
                decisions += self._made_elsewhere(self._cards[number], live.card)
        self._limit_failures()
        return decisions + self._proceed()

    def failed(self, attempt: str, error: str, accused: Mapping[int, str], healthy: bool) -> list[Decision]:
        """A card could not make a shard, and its process lives.

        Args:
            attempt: the attempt.
            error: why.
            accused: rows that raised alone, with no other row made afterwards.
            healthy: whether the card has made anything since; a card that has not is replaced.
        """
        if attempt not in self._attempts:
            return []
        live = self._release(attempt)
        trouble = self._trouble.setdefault(live.shard, Trouble())
        trouble.raised(live.card.number, error, accused)
        self._try_again(live.shard, trouble)
        live.card.strikes += 1
        decisions = []
        if not healthy and live.card.state is CardState.READY:
            decisions = self._replace_or_quarantine(live.card, error)
        return decisions + self._proceed()

    def recalled(self, attempt: str, given_back: bool) -> list[Decision]:
        """A card has answered a recall: it had not begun the shard and gave it back, or it keeps it."""
        if attempt not in self._attempts:
            return []
        self._asked_back.discard(attempt)
        if given_back:
            self._again.appendleft(self._release(attempt).shard)
        return self._proceed()

    def committed(self, shard: int) -> list[Decision]:
        """The manifest of a shard is in place, from this driver or from another."""
        if self._committing.pop(shard, None) is None:
            return []
        self._open -= 1
        return self._proceed()

    def stop(self, reason: str) -> list[Decision]:
        """Take up no more work; what has begun is finished."""
        self.stop_reason = self.stop_reason or reason
        return self._proceed()

    # -- what a reader may ask ----------------------------------------------------------------------------------

    def state(self, number: int) -> CardState:
        """Where a card is in its life; one that this schedule has not heard of waits for the cluster."""
        return self._cards[number].state if number in self._cards else CardState.WAITING

    def hand(self, number: int) -> list[str]:
        """The attempts in a card's hand, oldest first."""
        return list(self._cards[number].hand)

    def pending(self) -> int:
        """Shards that no card has."""
        return len(self._again) + self._fresh_count

    def usable(self) -> int:
        """Cards that are ready or starting."""
        return len(self._starting) + sum(map(len, self._holding))

    def useful(self) -> int:
        """Cards that would have something to do: those that are usable, and one for each shard that is left over when
        those of them without work have taken one."""
        return self.usable() + max(0, self.pending() - len(self._starting) - len(self._holding[0]))

    # -- decisions ----------------------------------------------------------------------------------------------

    def _proceed(self) -> list[Decision]:
        if self.finished:
            return []
        decisions = self._release_leaving()
        if self.stop_reason is None:
            decisions += self._assign() + self._recall_for_idle()
        else:
            decisions += [self._recall(attempt) for attempt in list(self._queued)]
        hopeless = not self.usable() and not (self._more_to_come and self._may_hope())
        over = self._open == 0 or self.stop_reason is not None or hopeless
        if over and not self._attempts and not self._committing:
            self.finished = True
            decisions.append(Finish(self._why_it_ended()))
        return decisions

    def _may_hope(self) -> bool:
        """Whether another card may do better: not if every one so far failed, and that on several nodes."""
        there = [card for card in self._cards.values() if card.state is not CardState.GONE]
        failed = all(card.state is CardState.QUARANTINED for card in there)
        return not failed or len({card.node for card in there}) < ENOUGH_NODES

    def _release_leaving(self) -> list[Decision]:
        free = [card for card in self._leaving.values() if not card.hand]
        for card in free:
            self._set_state(card, CardState.GONE)
        return [Release(card.number) for card in free]

    def _why_it_ended(self) -> str | None:
        if self._open == 0 and not self.stuck:
            return None
        if self.stop_reason is not None:
            return self.stop_reason
        if self._open:
            return f"no card is left; the last error of one: {self.last_error or 'none'}"
        shard, error = next(iter(self.stuck.items()))
        return f"{len(self.stuck)} shards could not be made; shard {shard}: {error}"

    def _assign(self) -> list[Decision]:
        decisions: list[Decision] = []
        if not self.pending():
            return decisions
        for in_hand in range(QUEUE):
            for card in list(self._holding[in_hand].values()):
                # Whoever has nothing comes first, a card that is still starting too.
                without_work = len(self._holding[0]) + len(self._starting) if in_hand else 0
                if self.pending() <= without_work:
                    return decisions
                shard = self._choose(card)
                if shard is not None:
                    decisions.append(self._send(card, shard))
        return decisions

    def _choose(self, card: _Card) -> int | None:
        for place, shard in enumerate(self._again):
            if self._may_have(card, shard):
                del self._again[place]
                return shard
        key = self._choose_key(card)
        if key is None:
            return None
        shard = self._fresh[key].popleft()
        self._fresh_count -= 1
        if not self._fresh[key]:
            del self._fresh[key]
        return shard

    def _choose_key(self, card: _Card) -> GraphKey | None:
        waiting = {key: (len(queue), self.shards[queue[0]].images) for key, queue in self._fresh.items()}
        return self._affinity.choose(card.number, waiting)

    def _may_have(self, card: _Card, shard: int) -> bool:
        trouble = self._trouble.get(shard)
        if trouble is None or card.number not in trouble.failed_on:
            return True
        # The word of one card is little, so a second is waited for even while it starts; after two nobody is.
        return not self._others(trouble.failed_on, starting=len(set(trouble.failed_on)) < ENOUGH_CARDS)

    def _others(self, numbers: Iterable[int], starting: bool = True) -> bool:
        """Whether a card is ready, or starting if that counts, that is none of these."""
        not_these = set(numbers)
        usable = (self._starting, *self._holding) if starting else self._holding
        return any(number not in not_these for cards in usable for number in cards)

    def _send(self, card: _Card, shard: int) -> Assign:
        self._sent += 1
        attempt = f"{self.prefix}{self._sent}"
        captures = self._affinity.use(card.number, self.shards[shard].bucket.graph_key)
        self._attempts[attempt] = _Attempt(shard, card, captures)
        card.hand[attempt] = None
        self._file(card)
        trouble = self._trouble.get(shard, Trouble())
        return Assign(
            card.number,
            self.shards[shard],
            attempt,
            trouble.announce,
            trouble.alone,
            dict(trouble.accused),
            dict(trouble.condemned),
        )

    def _recall_for_idle(self) -> list[Decision]:
        """Asks back a queued shard for each card that has nothing to do, if it is one that the card may have."""
        decisions: list[Decision] = []
        for card in self._holding[0].values():
            if not self._queued or len(self._asked_back) >= len(self._holding[0]):
                break
            for attempt, live in self._queued.items():
                shard = self.shards[live.shard]
                suits = self._affinity.suits(card.number, shard.bucket.graph_key, shard.images)
                if suits and self._may_have(card, live.shard):
                    decisions.append(self._recall(attempt))
                    break
        return decisions

    def _recall(self, attempt: str) -> Recall:
        live = self._queued.pop(attempt)
        live.recallable = False
        self._asked_back.add(attempt)
        return Recall(live.card.number, attempt)

    # -- failures -----------------------------------------------------------------------------------------------

    def _blame_death(self, card: _Card, error: str) -> None:
        hand = {attempt: self._attempts[attempt] for attempt in reversed(card.hand)}
        announced = {attempt for attempt, live in hand.items() if live.announced is not None}
        suspects = announced or set(hand)
        first = next(iter(card.hand), None)
        for attempt, live in hand.items():
            self._release(attempt)
            if attempt in suspects:
                trouble = self._trouble.setdefault(live.shard, Trouble())
                others = self._others([*trouble.died_on, card.number])
                trouble.died(card.number, error, live.announced, others)
                if attempt != first and attempt not in announced:
                    # It was behind another and may not have begun: suspect, but no failure of the card's.
                    trouble.failed_on.pop()
                self._try_again(live.shard, trouble)
            else:
                self._again.appendleft(live.shard)

    def _try_again(self, shard: int, trouble: Trouble) -> None:
        if trouble.stuck:
            self.stuck[shard] = trouble.error
            self._open -= 1
        else:
            self.retries += 1
            self._again.appendleft(shard)

    def _replace_or_quarantine(self, card: _Card, error: str) -> list[Decision]:
        self.last_error = error
        if card.start_failures >= MAX_START_FAILURES:
            return self._quarantine(card, f"it made nothing in {card.start_failures} starts: {error}")
        if card.strikes >= MAX_STRIKES:
            return self._quarantine(card, f"it failed {card.strikes} times in a row: {error}")
        self._set_state(card, CardState.STARTING)
        return [Replace(card.number)]

    def _made_elsewhere(self, card: _Card, maker: _Card) -> list[Decision]:
        if card is maker or card.state not in (CardState.STARTING, CardState.READY):
            return []
        card.vindications += 1
        if card.vindications < MAX_VINDICATIONS:
            return []
        return self._quarantine(card, f"{card.vindications} shards that it failed were made by other cards")

    def _quarantine(self, card: _Card, reason: str) -> list[Decision]:
        self._set_state(card, CardState.QUARANTINED)
        return [Quarantine(card.number, reason)]

    def _limit_failures(self) -> None:
        limit = self.max_failed
        if limit is not None and self.failed_rows > (limit if isinstance(limit, int) else limit * self.total_rows):
            self.stop_reason = self.stop_reason or f"{self.failed_rows} rows failed, more than max_failed ({limit})"
        elif self.done_rows >= ALL_FAILED_ROWS and self.failed_rows == self.done_rows:
            self.stop_reason = self.stop_reason or f"the first {self.done_rows} rows all failed"

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def _release(self, attempt: str) -> _Attempt:
        live = self._attempts.pop(attempt)
        self._asked_back.discard(attempt)
        self._queued.pop(attempt, None)
        del live.card.hand[attempt]
        self._file(live.card)
        return live

    def _prove(self, card: _Card) -> None:
        card.proven = True
        card.strikes = card.start_failures = 0

    def _set_state(self, card: _Card, state: CardState) -> None:
        """Moves a card on. Only a ready card has work in hand and graphs captured."""
        if state is not CardState.READY:
            for attempt in reversed(list(card.hand)):
                self._again.appendleft(self._release(attempt).shard)
            self._affinity.forget(card.number)
            card.proven = False
        self._more_to_come |= state in (CardState.GONE, CardState.QUARANTINED)
        card.state = state
        self._file(card)

    def _file(self, card: _Card) -> None:
        for cards in (self._starting, self._leaving, *self._holding):
            cards.pop(card.number, None)
        if card.state is CardState.STARTING:
            self._starting[card.number] = card
        elif card.state is CardState.LEAVING:
            self._leaving[card.number] = card
        elif card.state is CardState.READY:
            self._holding[len(card.hand)][card.number] = card
            for place, attempt in enumerate(card.hand):
                if place == 0:
                    self._queued.pop(attempt, None)
                elif self._attempts[attempt].recallable:
                    self._queued[attempt] = self._attempts[attempt]
