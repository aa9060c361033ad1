"""What became of each card is stored, line by line, once each, also where a store fails for a while."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from helpers import Unfenced

from gaudi_batch.card.messages import CardStatus, Ready
from gaudi_batch.driver.history import CardsAtWork, note_decision, note_event
from gaudi_batch.driver.slot import Slot
from gaudi_batch.errors import StorageError
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling import decisions, events
from gaudi_batch.storage.store import Storage

TASK = decisions.ShardTask(Shard(7, 0, 0, 4, Bucket(64, 64, 20, 2.0), 4, 4), "aaaaa9", backup_of="aaaaa3")


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    return Timeline(Ledger(Storage(str(tmp_path)), Unfenced()), "aaaaa")


def stored(tmp_path: Path) -> list[dict[str, object]]:
    files = sorted((tmp_path / "timeline").glob("*"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for line in lines:
        when = str(line.pop("time"))
        assert when.endswith("+00:00")
        ago = (datetime.now(timezone.utc) - datetime.fromisoformat(when)).total_seconds()
        assert (ago >= 100) == (line == {"slot": 3, "card": "", "what": "starting"}), "it was before the driver began"
    return lines


def test_the_life_of_a_card_is_in_the_timeline(timeline: Timeline, tmp_path: Path) -> None:
    slots = {3: Slot(3, name="host-0", ready=Ready("id", "host", 0, 1, 0.5, {}, "", None, 1))}
    slots[3].placed = time.monotonic() - 100.0
    note_event(timeline, events.CardPlaced(3, "id"), slots)
    for decision in (
        decisions.Admit(3),
        decisions.Assign(3, decisions.ShardTask(TASK.shard, "aaaaa2")),  # no news of the card
        decisions.Assign(3, TASK),
        decisions.Drop(3, "aaaaa9"),
        decisions.Replace(3),
        decisions.Quarantine(3, "it fails"),
        decisions.GiveBack(3),
        decisions.Finish(None),
    ):
        note_decision(timeline, decision, slots)
    timeline.write()
    card = {"slot": 3, "card": "host-0"}
    assert stored(tmp_path) == [
        {"slot": 3, "card": "", "what": "starting"},
        {**card, "what": "ready", "node": "host", "module": 0, "load_s": 0.5},
        {**card, "what": "backup", "shard": 7, "attempt": "aaaaa9", "backup_of": "aaaaa3"},
        {**card, "what": "dropped", "attempt": "aaaaa9"},
        {**card, "what": "starting"},
        {**card, "what": "quarantined", "error": "it fails"},
        {**card, "what": "released", "node_gone": True},
    ]


def test_a_card_works_from_its_first_shard_on_until_it_has_none_left(timeline: Timeline, tmp_path: Path) -> None:
    """Three cards: one gets its next shard at once, one after it was idle, one makes what another is making, too."""
    slots = {number: Slot(number, name=f"host-{number}") for number in range(3)}
    slots[1].status = CardStatus("idle", 1.5, 0.0, 0)  # it has stored its last image for so long
    cards = CardsAtWork(timeline, slots)

    def assign(card: int, attempt: str, backup_of: str | None = None) -> None:
        cards.note_decision(decisions.Assign(card, decisions.ShardTask(TASK.shard, attempt, backup_of=backup_of)))

    for number in slots:
        cards.note_decision(decisions.Admit(number))
    for card, attempt in ((0, "aaaaa1"), (1, "aaaaa2"), (2, "aaaaa3"), (2, "aaaaa4")):
        assign(card, attempt)
    cards.note_event(events.ShardMade("aaaaa1", events.ShardOutcome(4, 0, 0)))
    assign(0, "aaaaa5")
    cards.note_event(events.ShardMade("aaaaa2", events.ShardOutcome(4, 0, 0)))
    cards.note_event(events.AttemptEnded(2, "aaaaa3"))
    cards.tell_idle()
    assign(1, "aaaaa6")
    cards.note_event(events.RecallAnswered("aaaaa4", given_back=True))
    assign(2, "aaaaa7", backup_of="aaaaa5")
    cards.note_event(events.RecallAnswered("aaaaa6", given_back=False))
    cards.note_decision(decisions.Replace(0))
    cards.note_event(events.ShardFailed("aaaaa5", events.ShardFailure("no")))
    cards.tell_idle(0.0)
    timeline.write()
    lines = [json.loads(line) for file in sorted((tmp_path / "timeline").glob("*")) for line in file.open()]
    assert [(line["slot"], line["what"]) for line in lines] == [
        (0, "works"),
        (1, "works"),
        (2, "works"),
        (1, "idle"),
        (1, "works"),
        (2, "idle"),
        (2, "works"),
    ]
    idle, works = (datetime.fromisoformat(line["time"]) for line in lines[3:5])
    assert 1.5 <= (works - idle).total_seconds() < 60


def test_each_line_is_stored_once(timeline: Timeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline.note(0, "a", "starting")
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "put", lambda *_: (_ for _ in ()).throw(StorageError("full")))
        with pytest.raises(StorageError):
            timeline.write()
    timeline.write()
    timeline.write()
    timeline.note(0, "a", "released")
    timeline.write()
    assert [line["what"] for line in stored(tmp_path)] == ["starting", "released"]
    assert len(list((tmp_path / "timeline").iterdir())) == 1, "it grows"
    monkeypatch.setattr("gaudi_batch.output.timeline.MAX_BYTES", 100)
    for slot in (1, 2):
        timeline.note(slot, "a", "starting")
        timeline.write()
    assert [line["slot"] for line in stored(tmp_path)] == [0, 0, 1, 2]
    assert len(list((tmp_path / "timeline").iterdir())) == 2, "the first was full"
