"""What becomes of the cards, for the timeline and progress.json, by the events and decisions of the schedule."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gaudi_batch.driver.doing import Doing
from gaudi_batch.driver.slot import Slot
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.scheduling import decisions, events


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


class Uncommitted:
    """Since when each card has been at work that is not committed."""

    def __init__(self) -> None:
        self._attempts: dict[str, tuple[int, float]] = {}  # each with its card, and when that got it, monotonic
        self._committing: dict[int, str] = {}

    def note_event(self, event: events.Event) -> None:
        """Notes what ends an attempt."""
        if isinstance(event, events.ShardCommitted):
            self._attempts.pop(self._committing.pop(event.shard, ""), None)
        elif isinstance(event, (events.AttemptEnded, events.ShardFailed)) or (
            isinstance(event, events.RecallAnswered) and event.given_back
        ):
            self._attempts.pop(event.attempt, None)

    def note_decision(self, decision: decisions.Decision) -> None:
        """Notes what begins an attempt, or ends all of a card."""
        if isinstance(decision, decisions.Assign):
            self._attempts[decision.task.attempt] = decision.card, time.monotonic()
        elif isinstance(decision, decisions.Commit):
            self._committing[decision.shard] = decision.attempt
        elif isinstance(decision, decisions.Discard):
            self._attempts.pop(decision.attempt, None)
        elif isinstance(decision, (decisions.Replace, decisions.Quarantine, decisions.Release, decisions.GiveBack)):
            self._attempts = {name: of for name, of in self._attempts.items() if of[0] != decision.card}

    def seconds(self, *, committing: bool = True) -> dict[int, float]:
        """For how many seconds, by the number of the card; without those that have no such work.

        Args:
            committing: whether a shard counts that is made, while its manifest is being stored.
        """
        now, made = time.monotonic(), set() if committing else set(self._committing.values())
        longest: dict[int, float] = {}
        for attempt, (card, since) in self._attempts.items():
            if attempt not in made:
                longest[card] = max(longest.get(card, 0.0), now - since)
        return longest


def note_end(
    timeline: Timeline, slots: Iterable[Slot], cards: Mapping[str, Sequence[Doing]], uncommitted: Mapping[int, float]
) -> None:
    """Notes what the cards were at when their driver ended.

    Args:
        timeline: gets the lines.
        slots: the cards.
        cards: what each of them is at, by its label.
        uncommitted: for how many seconds each has been at work that is not committed, by its number.
    """
    for slot in slots:
        if at := cards.get(slot.label):
            seconds = round(uncommitted.get(slot.number, 0.0), 3)
            doing: dict[str, Any] = {"phase": at[0].phase, "phase_s": round(at[0].seconds, 3), "uncommitted_s": seconds}
            timeline.note(slot.number, slot.name, "over", **doing)


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
