"""How often something may fail before the schedule gives it up, and what it takes to blame a row."""

from __future__ import annotations

import pytest
from world import World, shards, start

from gaudi_batch.scheduling.card_events import MAX_CONSECUTIVE_FAILURES, MAX_SHARDS_MADE_ELSEWHERE
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.events import Reading, ShardFailure
from gaudi_batch.scheduling.failures import DEATHS_READING_A_ROW, DEATHS_TO_FAIL_A_ROW, MAX_TRIES, ShardFailures
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts


def settle(world: World) -> None:
    while world.commits or world.recalls:
        world.commit_first() if world.commits else world.answer_recall(True)


def test_a_shard_that_teaches_nothing_is_given_up_after_eight_tries() -> None:
    world = World(Schedule(shards(1), "a", RowCounts(4)))
    start(world, 12)
    tries = 0
    while not world.finished:
        card = next(card for card, tasks in world.in_flight.items() if tasks)
        world.fail_first(card, failed_alone_once=False, healthy=True)
        settle(world)
        tries += 1
        assert tries <= 12
    assert tries == MAX_TRIES == 8
    assert "1 shards could not be made; shard 0: boom" in str(world.finished[0])


def test_a_card_that_dies_again_and_again_is_quarantined_after_six_times_in_a_row() -> None:
    """Each time at another shard, so that no shard is to blame; in between it makes nothing."""
    world = World(Schedule(shards(40), "a", RowCounts(160)))
    start(world, 2)
    deaths = 0
    while world.schedule.state(0) is not CardState.QUARANTINED:
        world.begin(0)
        world.die(0)
        deaths += 1
        assert deaths <= 6
        settle(world)
        if 0 in world.starting:
            world.ready(0)
        settle(world)
    assert 0 in world.quarantined
    assert deaths == MAX_CONSECUTIVE_FAILURES


def test_what_a_card_makes_in_between_speaks_for_it() -> None:
    """A card whose failures others mend is quarantined after a few, but not if most of its shards succeed."""
    for between in (0, 2):
        world = World(Schedule(shards(60), "a", RowCounts(240)))
        start(world, 2)
        for _ in range(MAX_SHARDS_MADE_ELSEWHERE + 2):
            if 0 in world.quarantined:
                break
            failed = world.in_flight[0][0].shard.number
            world.fail_first(0, failed_alone_once=False, healthy=True)
            settle(world)
            for _ in range(60):
                if failed in world.committed or 0 in world.quarantined:
                    break
                if any(task.shard.number == failed for task in world.in_flight[0]):
                    break
                world.finish_first(1)
                settle(world)
            for _ in range(between):
                if world.in_flight.get(0):
                    world.finish_first(0)
                    settle(world)
        assert (0 in world.quarantined) is (between == 0), between


@pytest.mark.parametrize("others", [True, False])
def test_a_row_fails_without_running_for_a_batch_on_the_word_of_two_cards_where_there_are_two(others: bool) -> None:
    failures = ShardFailures()
    failures.died(0, "killed", frozenset({1, 2}), others)
    for _ in range(DEATHS_TO_FAIL_A_ROW):
        failures.died(0, "killed", frozenset({1}), others)
    assert (failures.fail_without_running != {}) is not others
    failures.died(1, "killed", frozenset({1}), others)
    assert list(failures.fail_without_running) == [1]


@pytest.mark.parametrize("others", [True, False])
def test_a_row_fails_without_running_for_its_reading_on_the_word_of_two_cards_where_there_are_two(others: bool) -> None:
    failures = ShardFailures()
    reading = Reading(0, range(8), range(4), by_row=True)
    for _ in range(DEATHS_READING_A_ROW):
        failures.died(0, "killed", reading, others)
    assert failures.is_certain_of_reading(others) is not others
    failures.died(1, "killed", reading, others)
    assert failures.is_certain_of_reading(others)


def test_a_death_is_a_try_of_the_shard_that_was_made_and_of_no_other_in_flight() -> None:
    """Which of them it was is found out by having both announce what they do."""
    world = World(Schedule(shards(6), "a", RowCounts(24)))
    start(world, 1)
    begun, queued = (task.shard.number for task in world.in_flight[0])
    world.begin(0)
    world.die(0)
    assert world.schedule.retries == 1
    world.ready(0)
    announced: dict[int, bool] = {}
    while not world.finished:
        if world.in_flight[0]:
            task = world.in_flight[0][0]
            announced.setdefault(task.shard.number, task.announce)
            world.finish_first(0)
        settle(world)
    assert (announced[begun], announced[queued]) == (True, True)
    assert sum(announced.values()) == 2


def test_a_failure_that_teaches_something_gives_a_shard_all_its_tries_again() -> None:
    failures = ShardFailures()
    for _ in range(MAX_TRIES - 1):
        failures.raised(0, ShardFailure("boom"))
    failures.raised(0, ShardFailure("boom", {1: "bad"}))
    assert not failures.stuck
    for _ in range(MAX_TRIES):
        assert not failures.stuck
        failures.raised(0, ShardFailure("boom", {1: "bad"}))
    assert failures.stuck
