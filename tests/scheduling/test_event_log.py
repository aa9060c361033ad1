"""What a schedule decided can be decided again, from a snapshot of it and the events since."""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from world import RULES, World, anything_happens, let_it_end, shards

from gaudi_batch.scheduling import events
from gaudi_batch.scheduling.decisions import Finish
from gaudi_batch.scheduling.event_log import VERSION, Entry, EventLog, load, main, replay
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts


def play(seed: int, count: int, max_events: int) -> EventLog:
    """A run in which anything happens, to its end."""
    schedule = Schedule(shards(count, buckets=2), "a", RowCounts(4 * count), RULES)
    log = EventLog(schedule, max_events)
    world = World(schedule)
    world.handle = log.handle
    rng = Random(seed)
    for card in range(3):
        world.join(card, f"node {card % 2}")
    for _ in range(80):
        if not world.finished:
            anything_happens(world, rng)
    let_it_end(world, 99)
    return log


@given(st.integers(0, 2**32), st.integers(1, 12), st.sampled_from([3, 20, 10_000]))
@settings(max_examples=examples(100))
def test_a_schedule_decides_the_same_when_it_is_told_the_same(seed: int, count: int, max_events: int) -> None:
    log = play(seed, count, max_events)
    events_told, differences = replay(log.dump())
    assert differences == []
    assert 0 < events_told <= 2 * max_events


@pytest.mark.parametrize("seed", range(60))
def test_what_dead_cards_leave_is_assigned_in_the_same_order_from_any_snapshot(seed: int) -> None:
    rng = Random(seed)
    log = EventLog(Schedule(shards(8), "a", RowCounts(32), RULES), 3)
    world = World(log.schedule)
    world.handle = log.handle
    for card in range(5):
        world.join(card, f"node {card % 3}")
        world.ready(card)
    while not world.finished:
        busy = [card for card, tasks in world.in_flight.items() if tasks]
        if busy and rng.random() < 0.4:
            world.die(max(busy, key=lambda card: len(world.in_flight[card])))
        elif busy and rng.random() < 0.5:
            world.finish_first(rng.choice(busy))
        elif world.commits:
            world.commit_first()
        elif world.recalls:
            world.answer_recall(True)
        elif world.starting:
            world.ready(rng.choice(sorted(world.starting)))
        assert replay(log.dump())[1] == []


def test_another_decision_than_the_logged_one_is_found() -> None:
    version, kept, snapshot, entries = pickle.loads(zlib.decompress(play(1, 8, 10_000).dump()))
    number = next(number for number, entry in enumerate(entries) if entry.decisions)
    entries[number] = Entry(entries[number].event, (*entries[number].decisions, Finish("never decided")))
    data = zlib.compress(pickle.dumps((version, kept, snapshot, entries)))
    _, (difference,) = replay(data)
    assert (difference.number, difference.logged[-1]) == (number, Finish("never decided"))


def test_the_command_says_whether_all_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.bin").write_bytes(play(2, 6, 10_000).dump())
    assert main([str(tmp_path / "events.bin")]) == 0
    assert "all decisions the same" in capsys.readouterr().out


def test_the_command_names_what_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.bin").write_bytes(b"junk")
    for arguments in ([], [str(tmp_path / "none")], [str(tmp_path / "events.bin")]):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_shows_the_first_decision_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version, kept, snapshot, entries = pickle.loads(zlib.decompress(play(1, 8, 10_000).dump()))
    entries[3] = Entry(entries[3].event, (Finish("never decided"),))
    (tmp_path / "events.bin").write_bytes(zlib.compress(pickle.dumps((version, kept, snapshot, entries))))
    assert main([str(tmp_path / "events.bin")]) == 1
    assert f"event 3 of {len(entries)}: " in capsys.readouterr().out


def test_a_log_takes_room_for_so_many_events_however_long_the_run_is() -> None:
    log = play(3, 12, 5)
    assert len(load(log.dump())[1]) <= 10


@pytest.mark.parametrize("code", [exec, eval, Path, zlib.compress])
def test_a_log_that_somebody_else_made_runs_no_code(code: object) -> None:
    data = zlib.compress(pickle.dumps((VERSION, [], pickle.dumps(code), [])))
    with pytest.raises(ValueError, match="no part of a schedule"):
        load(data)


@pytest.mark.parametrize("data", [b"", b"junk", zlib.compress(b""), zlib.compress(pickle.dumps((2, [], b"", [])))])
def test_what_is_no_log_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"no event log|version"):
        load(data)


def test_every_event_has_a_handler() -> None:
    schedule = Schedule(shards(1), "a", RowCounts(4))
    assert set(schedule._handlers) == set(get_args(events.Event))


def test_a_log_of_a_million_shards_has_a_small_snapshot() -> None:
    """Shards never change, so a snapshot leaves them out."""
    few, many = (EventLog(Schedule(shards(count), "a", RowCounts(4 * count))) for count in (1000, 2000))
    sizes = [len(log._parts[0][0]) for log in (few, many)]
    assert (sizes[1] - sizes[0]) / 1000 < 8, "bytes for each further shard"
