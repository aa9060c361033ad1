"""What became of each card is stored, line by line, once each, also where a store fails for a while."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest
from helpers import Unfenced

from gaudi_batch.card.messages import Ready
from gaudi_batch.driver.history import Uncommitted, note_decision, note_event
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


def test_a_card_is_at_work_that_is_not_committed_until_its_shards_are(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    uncommitted = Uncommitted()
    for card, attempt in ((0, "aaaaa1"), (0, "aaaaa2"), (1, "aaaaa3"), (2, "aaaaa4"), (3, "aaaaa5")):
        uncommitted.note_decision(decisions.Assign(card, decisions.ShardTask(TASK.shard, attempt)))
        now += 1.0
    assert uncommitted.seconds() == {0: 5, 1: 3, 2: 2, 3: 1}, "since each got the first of its shards"
    uncommitted.note_decision(decisions.Commit(11, "aaaaa1"))
    assert uncommitted.seconds()[0] == 5
    assert uncommitted.seconds(committing=False)[0] == 4
    uncommitted.note_event(events.ShardCommitted(11))
    uncommitted.note_event(events.RecallAnswered("aaaaa2", given_back=True))
    uncommitted.note_event(events.RecallAnswered("aaaaa3", given_back=False))
    uncommitted.note_event(events.AttemptEnded(2, "aaaaa4"))
    assert uncommitted.seconds() == {1: 3, 3: 1}
    uncommitted.note_decision(decisions.Replace(3))
    uncommitted.note_decision(decisions.Discard("aaaaa3"))
    assert uncommitted.seconds() == {}


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
    assert len(list((tmp_path / "timeline").iterdir())) == 2
