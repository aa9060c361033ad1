"""What the schedule decides in the cases that its rules name; test_schedule_machine.py has all others."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from world import CLUSTER_TIMEOUT_S, RULES, World, let_it_end, loaded, shards, start

from benchmarks.schedule import Simulation
from gaudi_batch.scheduling.admission import Requirements
from gaudi_batch.scheduling.card_events import MAX_SHARDS_MADE_ELSEWHERE, MAX_START_FAILURES
from gaudi_batch.scheduling.cards import MAX_IN_FLIGHT, CardState
from gaudi_batch.scheduling.decisions import Decision, Release
from gaudi_batch.scheduling.events import (
    BatchAnnounced,
    CardDied,
    CardLeaving,
    CardPlaced,
    ShardFailed,
    ShardFailure,
    StopRequested,
)
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules


def test_a_card_has_the_next_shard_while_it_works_on_one() -> None:
    world = World(Schedule(shards(10), "a", RowCounts(40)))
    start(world, 2)
    assert [len(tasks) for tasks in world.in_flight.values()] == [2, 2]


def test_near_the_end_nothing_queues_behind_a_busy_card() -> None:
    world = World(Schedule(shards(4), "a", RowCounts(16)))
    start(world, 2)
    world.finish_first(0)
    world.finish_first(0)
    assert [recall.card for recall in world.recalls] == [1]
    world.answer_recall(True)
    assert [len(world.in_flight[card]) for card in (0, 1)] == [1, 1]


def test_an_idle_card_does_not_ask_back_what_it_may_not_have() -> None:
    world = World(Schedule(shards(3), "a", RowCounts(12)))
    start(world, 2)
    world.fail_first(1, failed_alone_once=False, healthy=True)
    world.answer_recall(True)
    assert [task.shard.number for task in world.in_flight[0]] == [0, 2]
    world.finish_first(1)
    assert not world.recalls, "card 1 has failed shard 2, which waits for card 0"


def test_a_failed_shard_goes_to_another_card() -> None:
    world = World(Schedule(shards(6), "a", RowCounts(24)))
    start(world, 3)
    shard = world.in_flight[1][0].shard.number
    world.fail_first(1, failed_alone_once=False, healthy=True)
    for _ in range(20):
        busy = [card for card, tasks in world.in_flight.items() if tasks]
        if world.finished or not busy:
            break
        world.finish_first(busy[0])
    assert len(world.assigned_to[shard]) == 2
    assert world.assigned_to[shard][1] != 1


def test_a_shard_that_two_cards_failed_does_not_wait_for_one_that_starts() -> None:
    world = World(Schedule(shards(1), "a", RowCounts(4)))
    for card in range(3):
        world.join(card)
    world.ready(0)
    world.fail_first(0, failed_alone_once=False, healthy=True)
    assert not world.in_flight[0], "cards 1 and 2 may make it"
    world.ready(1)
    world.fail_first(1, failed_alone_once=False, healthy=True)
    assert world.assigned_to[0] == [0, 1, 0], "card 2 may take long"


def test_a_card_keeps_to_the_graph_keys_that_it_has_captured() -> None:
    work = shards(60, buckets=3)
    world = World(Schedule(work, "a", RowCounts(240)))
    start(world, 3)
    captured: dict[int, set[object]] = {card: set() for card in range(3)}
    while not world.finished:
        for card, tasks in list(world.in_flight.items()):
            if tasks:
                captured[card].add(tasks[0].shard.bucket.graph_key)
                world.finish_first(card)
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(True)
    assert sum(len(keys) for keys in captured.values()) <= 5, captured


@pytest.mark.parametrize("cards", [1, 2, 5])
@pytest.mark.parametrize("killers", [{35}, {33, 38, 46}, {1, 18, 35, 50, 70, 90}])
def test_rows_that_kill_are_found_and_no_card_is_blamed(cards: int, killers: set[int]) -> None:
    work = shards(8, rows=16)
    world = World(Schedule(work, "a", RowCounts(128)), rows=16)
    start(world, cards)
    deaths = 0
    for _ in range(1000):
        if world.finished:
            break
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(False)
        for card in sorted(world.starting):
            world.ready(card)
        if world.finished:
            break
        card = next(card for card, tasks in world.in_flight.items() if tasks)
        first = world.in_flight[card][0]
        rows = range(first.shard.start, first.shard.stop)
        deadly = killers.intersection(rows) - set(first.fail_without_running)
        if not deadly:
            world.finish_first(card, failed=len(first.fail_without_running))
            continue
        rest = [row for row in rows if row not in first.alone]
        batches = [rest[i : i + 4] for i in range(0, len(rest), 4)]
        batches += [[row] for row in rows if row in first.alone]
        for batch in batches:
            if first.announce:
                world.do(world.handle(BatchAnnounced(first.attempt, tuple(batch))))
            if deadly.intersection(batch):
                deaths += 1
                world.die(card)
                break
    assert world.finished == [None]
    assert deaths <= 3 * len(killers)
    assert not world.quarantined
    assert world.schedule.failed_rows == len(killers)


def test_a_card_that_always_fails_is_quarantined_and_costs_no_row() -> None:
    world = World(Schedule(shards(200), "a", RowCounts(800)))  # so many that each start is worth a capture
    start(world, 3)
    failures = 0
    while not world.finished:
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(True)
        for card in sorted(world.starting):
            world.ready(card)
        for card, tasks in list(world.in_flight.items()):
            if tasks and card in world.in_flight:
                if card == 1:
                    failures += 1
                    world.fail_first(1, failed_alone_once=True, healthy=False)
                else:
                    world.finish_first(card)
    assert world.finished == [None]
    assert world.quarantined == {1}
    assert world.schedule.failed_rows == 0
    assert failures <= MAX_SHARDS_MADE_ELSEWHERE + MAX_IN_FLIGHT


def test_cards_that_never_start_end_the_run_with_their_error() -> None:
    world = World(Schedule(shards(4), "a", RowCounts(16)))
    for card in range(3):
        world.join(card, "one")
    while world.starting:
        world.die(next(iter(world.starting)), "no memory")
    assert not world.finished, "others may take their place until the cluster has been looked at since"
    world.see()
    (reason,) = world.finished
    assert reason is not None
    assert "no memory" in reason


def test_a_card_that_is_refused_is_not_started_again_and_costs_no_row() -> None:
    world = World(Schedule(shards(4), "a", RowCounts(16)))
    for card in range(2):
        world.join(card)
    world.ready(0)
    world.refuse(1)
    assert (world.quarantined, world.starting) == ({1}, set())
    let_it_end(world, 2)
    assert world.finished == [None]
    assert world.schedule.failed_rows == 0


def test_a_run_whose_every_card_is_refused_ends_with_the_reason() -> None:
    rules = Rules(requirements=Requirements("a model", "its revision"))
    world = World(Schedule(shards(4), "a", RowCounts(16), rules))
    world.join(0)
    world.ready(0)
    world.see()
    (reason,) = world.finished
    assert "no card is left; the last error of one: node host of node of 0 would make other images" in str(reason)


def test_cards_whose_device_fails_before_they_made_anything_end_the_run_and_cost_no_row() -> None:
    world = World(Schedule(shards(4), "a", RowCounts(16)))
    start(world, 3)
    broken = 0
    while world.starting or world.in_flight:
        for card in sorted(world.starting):
            world.ready(card)
        card = next(card for card, tasks in world.in_flight.items() if tasks)
        if world.in_flight[card][0].announce:
            world.do(
                world.handle(BatchAnnounced(world.in_flight[card][0].attempt, ()))
            )  # its probe, which it does not make
        world.break_down(card)
        broken += 1
    world.see()
    assert broken == 3 * MAX_START_FAILURES
    assert world.schedule.failed_rows == 0
    (reason,) = world.finished
    assert reason is not None
    assert "out of device memory" in reason


def test_a_card_that_leaves_finishes_what_it_has_begun_and_gets_nothing_more() -> None:
    world = World(Schedule(shards(6), "a", RowCounts(24)))
    start(world, 2)
    world.take_leave(0)
    assert [recall.card for recall in world.recalls] == [0]
    world.answer_recall(True)
    assert world.schedule.state(0) is CardState.LEAVING
    world.finish_first(0)
    assert world.schedule.state(0) is CardState.GONE
    let_it_end(world, 2)
    assert world.finished == [None]
    assert len(world.assigned_to[0]) == 1, "what it had begun was not made again"


def test_a_card_that_dies_on_a_node_that_leaves_gives_its_place_back() -> None:
    """Or the cluster would move the place to another card, which nobody would use."""
    schedule = Schedule(shards(6), "a", RowCounts(24))
    for card in range(2):
        schedule.handle(CardPlaced(card))
        schedule.handle(loaded(card))
    schedule.handle(CardLeaving(0))
    assert Release(0) in schedule.handle(CardDied(0, "its node went down"))
    assert schedule.state(0) is CardState.GONE


def test_a_run_without_cards_waits_while_the_cluster_may_give_some() -> None:
    world = World(Schedule(shards(2), "a", RowCounts(8), RULES))
    world.see(more=1)
    start(world, 1)
    world.leave(0)
    assert not world.finished
    world.join(1)
    world.ready(1)
    world.see()
    world.leave(1)
    world.see(later=CLUSTER_TIMEOUT_S)
    assert not world.finished, "another node may come in place of one that was lost"
    world.see(later=1)
    assert world.finished == ["the cluster has had no card that works for 1800 s (limits.cluster)"]


def test_a_run_whose_every_card_failed_on_two_nodes_hopes_for_none() -> None:
    world = World(Schedule(shards(2), "a", RowCounts(8), RULES))
    world.see(more=1)
    for card, node in enumerate(["first", "first", "second"]):
        world.join(card, node)
        for _ in range(MAX_START_FAILURES):
            assert not world.finished
            world.die(card, "no such model")
    assert world.finished == ["no card is left; the last error of one: no such model"]


def test_a_quarantined_card_whose_node_goes_is_gone() -> None:
    world = World(Schedule(shards(2), "a", RowCounts(8), RULES))
    world.see(more=1)
    world.join(0, "first")
    for _ in range(MAX_START_FAILURES):
        world.die(0, "no such module")
    assert world.schedule.state(0) is CardState.QUARANTINED
    world.leave(0)
    assert world.schedule.state(0) is CardState.GONE
    let_it_end(world, 1)
    assert world.finished == [None]


def test_the_loss_of_a_node_counts_against_nobody() -> None:
    world = World(Schedule(shards(10), "a", RowCounts(40)))
    start(world, 3)
    world.leave(2)
    assert world.schedule.retries == 0
    assert world.schedule.state(2) is CardState.GONE
    let_it_end(world, 9)
    assert world.finished == [None]


@pytest.mark.parametrize(("limit", "stops"), [(3, True), (4, False), (0.09, True), (0.11, False), (None, False)])
def test_max_failed_is_a_count_or_a_share(limit: float | None, stops: bool) -> None:
    world = World(Schedule(shards(10), "a", RowCounts(40), Rules(max_failed=limit)))
    start(world, 1)
    while not world.finished:
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(True)
        if world.in_flight.get(0):
            number = world.in_flight[0][0].shard.number
            world.finish_first(0, failed=1 if number < 4 else 0)
    assert (world.finished[0] is not None) is stops


def test_a_run_whose_first_200_rows_all_failed_stops() -> None:
    world = World(Schedule(shards(100), "a", RowCounts(400)))
    start(world, 2)
    while not world.finished:
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(True)
        for card, tasks in list(world.in_flight.items()):
            if tasks:
                world.finish_first(card, failed=4)
    assert "all failed" in str(world.finished[0])
    assert world.schedule.done_rows < 220


def test_stop_finishes_what_has_begun_and_takes_back_the_rest() -> None:
    world = World(Schedule(shards(10), "a", RowCounts(40)))
    start(world, 2)
    world.do(world.handle(StopRequested("enough")))
    while world.recalls:
        world.answer_recall(True)
    for card in (0, 1):
        world.finish_first(card)
    assert not world.finished
    while world.commits:
        world.commit_first()
    assert world.finished == ["enough"]
    assert len(world.committed) == 2


def test_an_event_costs_as_much_work_with_a_thousand_cards_as_with_a_hundred() -> None:
    """Counted in calls of functions: sixteen shapes and six, slow cards and deaths, to the end."""

    def calls_an_event(cards: int, keys: int, lost_nodes: int = 0, shards: int = 3) -> float:
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        def watch(call: Callable[[], list[Decision]]) -> list[Decision]:
            sys.setprofile(count)
            try:
                return call()
            finally:
                sys.setprofile(None)

        simulation = Simulation(cards, keys, shards, lost_nodes=lost_nodes, watch=watch)
        simulation.run()
        assert simulation.reason is None
        return calls / simulation.events

    few, many = calls_an_event(100, 16), calls_an_event(1000, 16)
    assert many < 2 * few
    assert many < 250
    assert calls_an_event(5_000, 6, shards=1) < 250
    # Shards that were lost with two nodes wait for nodes of their own.
    assert calls_an_event(1000, 6, lost_nodes=40) < 500


def test_a_run_that_stops_gives_each_card_back_as_soon_as_it_has_nothing_in_flight() -> None:
    world = World(Schedule(shards(40), "a", RowCounts(160), RULES))
    start(world, 3)
    world.join(3)  # it loads
    world.see(more=2)
    assert len(world.unplaced) == 2
    for card in range(3):
        world.begin(card)
    world.do(world.handle(StopRequested("enough")))
    assert world.unplaced == []
    assert world.schedule.state(3) is CardState.GONE
    while world.recalls:
        world.answer_recall(True)
    for card in range(3):
        assert world.schedule.state(card) is CardState.READY, "what it has begun is made"
        world.finish_first(card)
        assert world.schedule.state(card) is CardState.GONE
        assert world.finished == []
    while world.commits:
        world.commit_first()
    assert world.finished == ["enough"]
    assert len(world.committed) == 3


def test_storage_that_fails_while_a_run_stops_ends_nothing_that_has_begun() -> None:
    """The cards that were given back do not make the others all that there are."""
    world = World(Schedule(shards(40), "a", RowCounts(160), RULES))
    for card, node in enumerate((0, 1, 1, 2, 3)):
        world.join(card, f"node {node}")
        world.ready(card)
    for card in range(5):
        world.begin(card)
    world.do(world.handle(StopRequested("enough")))
    while world.recalls:
        world.answer_recall(True)
    for card in (3, 4):
        world.finish_first(card)
    for card in (0, 1):
        task = world.in_flight[card].pop(0)
        world.do(world.handle(ShardFailed(task.attempt, ShardFailure("no storage", healthy=False, storage=True))))
    assert world.finished == [], "a card still makes its shard"
    world.finish_first(2)
    while world.commits:
        world.commit_first()
    assert world.finished == ["enough"]
    assert len(world.committed) == 3


def test_a_quarantined_card_is_given_back_when_its_run_stops() -> None:
    world = World(Schedule(shards(40), "a", RowCounts(160), RULES))
    start(world, 3)
    while world.schedule.state(1) is not CardState.QUARANTINED:
        world.break_down(1)
        world.starting.add(1) if world.schedule.state(1) is CardState.STARTING else None
        if world.schedule.state(1) is CardState.STARTING:
            world.ready(1)
    world.do(world.handle(StopRequested("enough")))
    assert world.schedule.state(1) is CardState.GONE
