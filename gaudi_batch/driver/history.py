"""What becomes of the cards, for the timeline: the lines that follow from events and decisions of the schedule."""

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
