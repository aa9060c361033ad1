"""What becomes of the cards, for the timeline: the lines that follow from events and decisions of the schedule."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gaudi_batch.driver.doing import Doing
from gaudi_batch.driver.slot import Slot
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.scheduling import decisions, events

IDLE_S = 1.0
"""Seconds without work after which a card is idle; one that gets some sooner has waited for it."""


def note_event(timeline: Timeline, event: events.Event, slots: Mapping[int, Slot]) -> None:
    """Notes that a card's first process is started, or was before the driver began.

    Args:
        timeline: gets the line.
        event: the event.
        slots: the cards by number.
    """
    if isinstance(event, events.CardPlaced):
        placed = slots[event.card].placed
        timeline.note(event.card, "", "starting", ago_s=0.0 if placed is None else time.monotonic() - placed)


def note_decision(timeline: Timeline, decision: decisions.Decision, slots: Mapping[int, Slot]) -> None:
    """Notes what a decision means for a card, if it means anything for its life.

    Args:
        timeline: gets the line.
        decision: the decision.
        slots: the cards by number.
    """
    line = _line(decision, slots)
    if line is not None:
        what, more = line
        number = decision.card  # type: ignore[union-attr]
        timeline.note(number, slots[number].name, what, **more)


class CardsAtWork:
    """Which cards have work, for the timeline: `works` where an idle card gets some, `idle` where one has none left.

    Args:
        timeline: gets the lines.
        slots: the cards by number.
    """

    def __init__(self, timeline: Timeline, slots: Mapping[int, Slot]) -> None:
        self._timeline, self._slots = timeline, slots
        self._attempts: dict[str, int] = {}  # those that go on, each with its card
        self._counts: Counter[int] = Counter()  # how many a card has
        self._idle: set[int] = set()
        self._idle_since: dict[int, float] = {}  # of those of which no line says so yet, monotonic

    def note_event(self, event: events.Event) -> None:
        """Notes what ends an attempt."""
        ends = (events.ShardMade, events.DoubtsChecked, events.ShardFailed, events.AttemptEnded)
        if not isinstance(event, ends) and not (isinstance(event, events.RecallAnswered) and event.given_back):
            return
        card = self._attempts.pop(event.attempt, None)
        if card is None:
            return
        self._counts[card] -= 1
        if not self._counts[card]:
            status = self._slots[card].status
            stored_s = status.phase_s if status is not None and status.phase == "idle" else 0.0  # its device had ended
            self._idle_since[card] = time.monotonic() - stored_s

    def note_decision(self, decision: decisions.Decision) -> None:
        """Notes what begins an attempt, or ends all of a card."""
        if isinstance(decision, decisions.Assign):
            card, is_backup = decision.card, decision.task.backup_of is not None
            if is_backup:
                self._tell_idle(card)  # what comes now is told apart from what was
            self._idle_since.pop(card, None)
            if card in self._idle:
                self._idle.remove(card)
                self._timeline.note(card, self._slots[card].name, "works")
            self._attempts[decision.task.attempt] = card
            self._counts[card] += 1
        elif isinstance(decision, decisions.Admit):
            self._idle.add(decision.card)
        elif isinstance(decision, (decisions.Replace, decisions.Quarantine, decisions.Release, decisions.GiveBack)):
            self._attempts = {name: card for name, card in self._attempts.items() if card != decision.card}
            self._counts.pop(decision.card, None)
            self._idle.discard(decision.card)
            self._idle_since.pop(decision.card, None)

    def tell_idle(self, seconds: float = IDLE_S) -> None:
        """Notes the cards that have been idle for so many seconds."""
        since = time.monotonic() - seconds
        for card in [card for card, begun in self._idle_since.items() if begun <= since]:
            self._tell_idle(card)

    def _tell_idle(self, card: int) -> None:
        since = self._idle_since.pop(card, None)
        if since is not None:
            self._idle.add(card)
            self._timeline.note(card, self._slots[card].name, "idle", ago_s=time.monotonic() - since)


def note_end(timeline: Timeline, slots: Iterable[Slot], cards: Mapping[str, Sequence[Doing]]) -> None:
    """Notes what the cards were at when their driver ended.

    Args:
        timeline: gets the lines.
        slots: the cards.
        cards: what each of them is at, by its label.
    """
    for slot in slots:
        at = cards.get(slot.label)
        if at:
            timeline.note(slot.number, slot.name, "over", phase=at[0].phase, phase_s=round(at[0].seconds, 3))


def _line(decision: decisions.Decision, slots: Mapping[int, Slot]) -> tuple[str, dict[str, Any]] | None:
    if isinstance(decision, decisions.Admit):
        ready = slots[decision.card].ready
        assert ready is not None
        return "ready", {"node": ready.node, "module": ready.module, "load_s": round(ready.load_s, 3)}
    if isinstance(decision, decisions.Replace):
        return "starting", {}
    if isinstance(decision, decisions.Quarantine):
        return "quarantined", {"error": decision.reason}
    if isinstance(decision, decisions.Release):
        return "released", {}
    if isinstance(decision, decisions.GiveBack):
        return "released", {"node_gone": True}
    if isinstance(decision, decisions.Assign) and decision.task.backup_of is not None:
        task = decision.task
        return "backup", {"shard": task.shard.number, "attempt": task.attempt, "backup_of": task.backup_of}
    if isinstance(decision, decisions.Drop):
        return "dropped", {"attempt": decision.attempt}
    return None
