"""Second attempts at the last shards: when a card idles and nothing that waits is worth it, a shard that would end
later where it is than on the idle card is begun there, too. Pure, a part of the schedule.

These are the backup tasks of MapReduce (Dean and Ghemawat, OSDI 2004). The first attempt that is made is committed, and
the card of the other is told to drop it. A shard has one backup at most, and none if it has failed before.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping

from gaudi_batch.plan import BatchKind, Shard
from gaudi_batch.scheduling.cards import Attempt, Card
from gaudi_batch.scheduling.decisions import Decision, Drop
from gaudi_batch.scheduling.dispatch import Dispatch
from gaudi_batch.scheduling.pace import BatchTimes, Pace

OVERDUE_FACTOR = 1.3
"""A shard is overdue after so many times what its pipeline calls should take. From then on it is taken to need as long
again as it has taken."""
OVERDUE_MIN_S = 0.5
"""Seconds beyond these calls that reading, storing and messages may take."""
MAX_LOOKED_AT = 16
"""Attempts at which one event looks."""
MAX_COMPARED = 64
"""Idle cards among which one is chosen."""
MIN_WAIT_S = 0.1
"""Seconds after which an attempt is looked at again, at least."""
TIMES_WATCHED = 8
"""Twice how often an attempt may begin to be watched: when it is its card's first, read, generated, or recalled."""
GAIN_FACTOR = 1.1
"""How many times longer the first attempt has to go on than the second would take."""


class Backups:
    """Watches the attempts of a run for those that are worth a second one.

    Args:
        work: the shards that are not made yet.
        shards: all shards, by number.
        batch_size: images of one pipeline call.
        known: what earlier drivers' batches have taken, by kind.
    """

    def __init__(
        self, work: Dispatch, shards: Mapping[int, Shard], batch_size: int, known: Mapping[BatchKind, BatchTimes]
    ) -> None:
        self.pace = Pace(batch_size, known)
        self._work = work
        self._shards = shards
        self._due: list[tuple[float, str]] = []  # a heap of attempts, by the time from which a backup may be worth it
        self._unknown: dict[BatchKind, dict[str, None]] = {}  # attempts of kinds of which nothing is known yet

    def is_waiting(self) -> bool:
        """Whether the passing of time alone may lead to a decision."""
        return bool(self._due) and bool(self._work.cards.open[0])

    def begun(self, attempt: str, now: float) -> None:
        """Notes that an attempt is to be watched from now on: its card begins to read or to generate the shard, was
        asked to give it back, or has nothing else to do."""
        live = self._work.attempts[attempt]
        live.begun_at, live.watched = now, True
        self._watch(attempt, live)
        if len(self._due) > TIMES_WATCHED * len(self._work.attempts) + MAX_LOOKED_AT:
            # So that those of attempts that have ended do not gather in a long run.
            self._due = [entry for entry in self._due if entry[1] in self._work.attempts]
            heapq.heapify(self._due)

    def took(self, live: Attempt, seconds: float) -> None:
        """Notes how long the pipeline calls of a shard took."""
        shard = self._shards[live.shard]
        if self.pace.took(live.card.number, shard, seconds, live.captures):
            for attempt in self._unknown.pop(shard.bucket.batch_kind, {}):
                if (other := self._work.attempts.get(attempt)) is not None:
                    self._watch(attempt, other)

    def next(self, now: float) -> list[Decision]:
        """Begins the backups that are worth it now."""
        self._watch_unanswered(now)
        decisions: list[Decision] = []
        later: list[tuple[float, str]] = []
        # A few at a time: an event must not cost more if many are due.
        for _ in range(MAX_LOOKED_AT):
            if not self.is_waiting() or self._due[0][0] > now:
                break
            _, attempt = heapq.heappop(self._due)
            live = self._work.attempts.get(attempt)
            if live is None or live.shard in self._work.failures or len(self._work.attempts_at[live.shard]) > 1:
                continue
            remaining = self._remaining_s(live, now)
            card = self._best_card(live, remaining)
            if card is not None:
                decisions.append(self._work.send(card, live.shard, attempt))
            else:
                # What is not overdue yet may become so, what is overdue is worth more the longer it takes, and for what
                # is slow a card may idle soon that has captured the graph.
                overdue_at = self._overdue_at(live)
                is_late = now >= overdue_at or self._is_slow(live)
                later.append((now + max(remaining / 4, MIN_WAIT_S) if is_late else overdue_at, attempt))
        for entry in later:
            heapq.heappush(self._due, entry)
        return decisions

    def _watch_unanswered(self, now: float) -> None:
        """Watches what a card should begin or give back: a process that stands still does neither."""
        unanswered, self._work.to_watch = self._work.to_watch, []
        for attempt in unanswered if math.isfinite(now) else ():
            live = self._work.attempts.get(attempt)
            if live is not None and not live.watched:
                self.begun(attempt, now)

    def end_others(self, shard: int) -> list[Decision]:
        """Has the other attempts at a shard dropped that is made."""
        decisions: list[Decision] = []
        for attempt in list(self._work.attempts_at.get(shard, ())):
            card = self._work.attempts[attempt].card
            decisions += self._work.recall_queued_of(card)  # which the card, if it hangs, would never begin
            self._work.release(attempt)
            self._work.drop_reservation(card)  # it may hang
            card.dropping = attempt
            self._work.cards.file(card)
            decisions.append(Drop(card.number, attempt))
        return decisions

    def dropped(self, card: Card, attempt: str) -> None:
        """Notes that a card is done with an attempt that it was told to drop."""
        if card.dropping == attempt:
            card.dropping = None
            self._work.cards.file(card)

    def _watch(self, attempt: str, live: Attempt) -> None:
        shard = self._shards[live.shard]
        own = self.pace.expected_s(live.card.number, shard, live.captures)
        if own is None:
            unknown = self._unknown.setdefault(shard.bucket.batch_kind, {})
            unknown[attempt] = None
            if len(unknown) > 2 * len(self._work.attempts) + MAX_LOOKED_AT:
                self._unknown[shard.bucket.batch_kind] = {name: None for name in unknown if name in self._work.attempts}
            return
        heapq.heappush(self._due, (live.begun_at if self._is_slow(live) else self._overdue_at(live), attempt))

    def _is_slow(self, live: Attempt) -> bool:
        """Whether a card of the usual speed that has captured the graph would make the shard much sooner."""
        shard = self._shards[live.shard]
        own = self.pace.expected_s(live.card.number, shard, live.captures)
        usual = self.pace.expected_s(-1, shard, captures=False)
        return own is not None and usual is not None and own > usual * GAIN_FACTOR

    def _overdue_at(self, live: Attempt) -> float:
        own = self.pace.expected_s(live.card.number, self._shards[live.shard], live.captures)
        return live.begun_at + max(OVERDUE_FACTOR * (own or 0.0), (own or 0.0) + OVERDUE_MIN_S)

    def _remaining_s(self, live: Attempt, now: float) -> float:
        elapsed = now - live.begun_at
        if now >= self._overdue_at(live):
            return elapsed
        own = self.pace.expected_s(live.card.number, self._shards[live.shard], live.captures)
        return max(0.0, (own or 0.0) - elapsed)

    def _best_card(self, live: Attempt, remaining: float) -> Card | None:
        """An idle card that would make the shard sooner than its own."""
        shard = self._shards[live.shard]
        key = shard.bucket.graph_key
        captured = self._work.cards.by_key[0].get(key) or {}
        for cards, captures in ((captured, False), (self._work.cards.open[0], True)):
            for card in itertools.islice(cards.values(), MAX_COMPARED):
                seconds = self.pace.expected_s(card.number, shard, captures)
                if card is not live.card and seconds is not None and seconds * GAIN_FACTOR < remaining:
                    return card
                if captures:
                    break  # a capture costs every card the same
        return None
