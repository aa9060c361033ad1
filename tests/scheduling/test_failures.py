"""Whose fault a failure is: a row's, a card's, a node's, storage's, or the job's. The schedule alone, without Ray."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from world import World, let_it_end, loaded, shards, start

from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.card_events import MAX_CONSECUTIVE_FAILURES
from gaudi_batch.scheduling.cards import Card
from gaudi_batch.scheduling.decisions import Assign, CheckStorage, Quarantine, ShardTask
from gaudi_batch.scheduling.events import (
    BatchAnnounced,
    CardBroken,
    CardDied,
    CardPlaced,
    LargeBatch,
    Reading,
    ReadingAnnounced,
    ShardBegun,
    ShardFailed,
    ShardFailure,
    ShardMade,
    ShardOutcome,
    SlowBatch,
    SlowReading,
    StorageStalled,
)
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts
from gaudi_batch.scheduling.verdicts import MAX_FRUITLESS_NODES, TransientFailures

REFUSED = ShardFailure("StorageError: read-only file system", healthy=False, storage=True)


def settle(world: World) -> None:
    """Carries out what needs no card: commits, recalls, starts."""
    while not world.finished and (world.commits or world.recalls or world.starting):
        if world.commits:
            world.commit_first()
        elif world.recalls:
            world.answer_recall(True)
        else:
            world.ready(min(world.starting))


def busy(world: World) -> list[int]:
    return [card for card, tasks in world.in_flight.items() if tasks]


def refuse(world: World, card: int) -> None:
    task = world.in_flight[card].pop(0)
    world.do(world.schedule.handle(ShardFailed(task.attempt, REFUSED)))


# -- storage ----------------------------------------------------------------------------------------------------


def test_storage_that_fails_every_card_of_one_node_costs_that_node_alone() -> None:
    world = World(Schedule(shards(60), "a", RowCounts(240)))
    start(world, 8, per_node=4)
    for _ in range(1000):
        settle(world)
        world.check_storage()
        if world.finished:
            break
        bad = [card for card in busy(world) if card >= 4]
        if bad:
            refuse(world, bad[0])
        else:
            world.finish_first(busy(world)[0])
    assert world.finished == [None]
    assert world.quarantined == {4, 5, 6, 7}


def test_storage_that_fails_on_every_node_ends_the_run() -> None:
    world = World(Schedule(shards(20), "a", RowCounts(80)))
    start(world, 4, per_node=2)
    refuse(world, 0)
    refuse(world, 1)
    assert not world.finished, "one node is no two"
    refuse(world, 2)
    assert world.finished == [REFUSED.error]


def test_two_nodes_for_which_storage_fails_stop_no_third() -> None:
    world = World(Schedule(shards(20), "a", RowCounts(80)))
    start(world, 3, per_node=1)
    refuse(world, 0)
    refuse(world, 1)
    assert not world.finished
    world.finish_first(2)
    refuse(world, 2)
    assert not world.finished, "it has stored a shard since"


def test_storage_that_fails_for_the_driver_too_ends_the_run_on_one_node() -> None:
    world = World(Schedule(shards(20), "a", RowCounts(80)))
    start(world, 2, per_node=2)
    refuse(world, 0)
    refuse(world, 1)
    assert len(world.checks) == 1
    world.check_storage("can't write: read-only file system")
    assert world.finished == ["can't write: read-only file system"]


@pytest.mark.parametrize(("cards", "per_node"), [(8, 8), (64, 64), (64, 8)])
def test_rows_that_nobody_can_read_stop_their_shard_alone(cards: int, per_node: int) -> None:
    world = World(Schedule(shards(300), "a", RowCounts(1200)))
    start(world, cards, per_node)
    failures = 0
    for _ in range(5000):
        settle(world)
        world.check_storage(of_shard="prompts: can't read part-0.parquet: EIO")
        if world.finished:
            break
        card = next((c for c in busy(world) if world.in_flight[c][0].shard.number == 7), busy(world)[0])
        if world.in_flight[card][0].shard.number == 7:
            failures += 1
            refuse(world, card)
        else:
            world.finish_first(card)
    assert world.finished == ["1 shards could not be made; shard 7: prompts: can't read part-0.parquet: EIO"]
    assert len(world.committed) == 299
    assert failures <= 2
    assert not world.quarantined


def test_one_check_of_storage_is_enough_at_a_time() -> None:
    schedule = Schedule(shards(20), "a", RowCounts(80))
    world = World(schedule)
    start(world, 2, per_node=2)
    for card in (0, 1):
        refuse(world, card)
    assert len(world.checks) == 1
    world.check_storage()
    settle(world)
    refuse(world, 0)
    assert len(world.checks) == 1


def test_a_card_whose_storage_fails_while_it_loads_is_started_again_and_not_for_ever() -> None:
    schedule = Schedule(shards(4), "a", RowCounts(16))
    world = World(schedule)
    world.join(0)
    for _ in range(MAX_CONSECUTIVE_FAILURES):
        assert not world.quarantined
        world.starting.discard(0)
        world.do(schedule.handle(CardBroken(0, "can't read run.json, tried for 600 s", storage=True)))
        world.check_storage()
    assert world.quarantined == {0}


def test_storage_that_fails_the_driver_and_a_card_that_loads_ends_the_run() -> None:
    world = World(Schedule(shards(4), "a", RowCounts(16)))
    world.join(0)
    world.do(world.schedule.handle(CardBroken(0, "can't read run.json, tried for 600 s", storage=True)))
    assert len(world.checks) == 1
    world.check_storage("can't write: no answer")
    assert world.finished == ["can't write: no answer"]


def test_what_storage_did_says_nothing_of_a_shard() -> None:
    schedule = Schedule(shards(1), "a", RowCounts(4))
    world = World(schedule)
    world.join(8, "good")
    for number in range(8):
        world.join(number, f"node {number}")
        world.ready(number)
        refuse(world, number)
        assert not schedule.stuck
    world.ready(8)
    settle(world)
    let_it_end(world, 99)
    assert world.finished == [None]


# -- nodes ------------------------------------------------------------------------------------------------------


def play_killer(world: World, deadly: dict[int, int], act: Callable[[World, int], None], new: int, size: int) -> int:
    """Plays a run in which a row takes something down when its batch begins; returns how often that was.

    Args:
        world: the run.
        deadly: rows that do, with their shard.
        act: what happens to a card that begins such a row.
        new: the number of the next card that joins.
        size: cards of a node.
    """
    disasters = 0
    for _ in range(5000):
        settle(world)
        if world.finished:
            break
        if not world.in_flight and not world.starting:
            for card in range(new, new + size):
                world.join(card, f"node {card // size}")
            new += size
            continue
        card = busy(world)[0]
        task = world.in_flight[card][0]
        rows = range(task.shard.start, task.shard.stop)
        rest = [row for row in rows if row not in task.alone]
        batches = [rest[i : i + 4] for i in range(0, len(rest), 4)] + [[row] for row in rows if row in task.alone]
        for batch in batches:
            if task.announce:
                world.do(world.schedule.handle(BatchAnnounced(task.attempt, tuple(batch))))
            if set(batch) & (deadly.keys() - task.fail_without_running.keys()):
                disasters += 1
                act(world, card)
                break
        else:
            world.finish_first(card, failed=len(task.fail_without_running))
    return disasters


def test_a_row_that_takes_its_node_down_is_found_and_costs_four_nodes_at_most() -> None:
    work = shards(12, rows=16)
    world = World(Schedule(work, "a", RowCounts(192)), rows=16)
    world.see(more=1)
    start(world, 4, per_node=4)
    lost = play_killer(world, {70: 4}, World.lose_node, new=4, size=4)
    assert world.finished == [None]
    assert lost <= 4
    assert world.schedule.failed_rows == 1
    assert not world.quarantined


def test_a_shard_that_was_lost_with_two_nodes_runs_where_nothing_else_is_in_flight() -> None:
    work = shards(40, rows=16)
    schedule = Schedule(work, "a", RowCounts(640))
    world = World(schedule, rows=16)
    world.see(more=1)
    start(world, 8, per_node=4)
    suspect = world.in_flight[0][0].shard.number
    for node in range(2, 4):
        settle(world)
        holder = next(
            card for card, tasks in world.in_flight.items() if suspect in [task.shard.number for task in tasks]
        )
        world.lose_node(holder)
        for card in range(4 * node, 4 * node + 4):
            world.join(card, f"node {node}")
        settle(world)
    for _ in range(200):
        settle(world)
        holders = [card for card, tasks in world.in_flight.items() if suspect in [task.shard.number for task in tasks]]
        if holders:
            break
        world.finish_first(busy(world)[0])
    (holder,) = holders
    beside = [card for card, node in world.nodes.items() if node == world.nodes[holder] and world.in_flight.get(card)]
    assert beside == [holder]
    assert world.in_flight[holder][0].announce
    others = [card for card in world.in_flight if world.nodes[card] != world.nodes[holder]]
    assert all(world.in_flight[card] for card in others), "the other node works on"
    world.finish_first(holder)
    settle(world)
    assert all(world.in_flight[card] for card in world.in_flight), "its node works again, too"


def test_shards_that_are_lost_with_nodes_that_others_took_down_are_made() -> None:
    work = shards(30, rows=16)
    world = World(Schedule(work, "a", RowCounts(480)), rows=16)
    world.see(more=1)
    start(world, 8, per_node=8)
    lost = play_killer(world, {70: 4, 200: 12}, World.lose_node, new=8, size=8)
    assert world.finished == [None]
    assert lost <= 8
    assert world.schedule.failed_rows == 2, "no neighbour failed for it"


def test_nodes_that_go_down_while_their_cards_load_end_the_run() -> None:
    world = World(Schedule(shards(4), "a", RowCounts(16)))
    world.see(more=1)
    for node in range(100):
        if world.finished:
            break
        for card in (2 * node, 2 * node + 1):
            world.join(card, f"node {node}")
        world.lose_node(2 * node)
        if not world.finished:
            world.see(more=1)
    assert node <= MAX_FRUITLESS_NODES
    assert world.finished == [
        f"{MAX_FRUITLESS_NODES} nodes in a row were lost before a card of theirs had made anything"
    ]


def test_many_nodes_that_are_lost_at_once_are_one_loss() -> None:
    world = World(Schedule(shards(4), "a", RowCounts(16)))
    world.see(more=1)
    start(world, 50, per_node=1)
    for card in range(50):
        world.leave(card)
    assert not world.finished
    let_it_end(world, 99)
    assert world.finished == [None]


# -- reading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cards", [1, 2, 5])
def test_reading_that_kills_is_found_within_four_deaths_and_costs_no_other_row(cards: int) -> None:
    """The first is that of a shard behind which it was read.

    Shard 3 has rows 48 to 63; in row group 1, rows 56 to 63, nothing from row 60 on can be decoded.
    """
    work = shards(12, rows=16)
    world = World(Schedule(work, "a", RowCounts(192)), rows=16)
    start(world, cards)
    deaths = 0
    for _ in range(1000):
        settle(world)
        if world.finished:
            break
        # The card reads what it has in hand before it makes the first of it.
        reader = next((c for c, tasks in world.in_flight.items() if 3 in [task.shard.number for task in tasks]), None)
        card = busy(world)[0] if reader is None else reader
        task = next((t for t in world.in_flight[card] if t.shard.number == 3), world.in_flight[card][0])
        if task.shard.number == 3:
            if not read(world, task):
                deaths += 1
                world.die(card)
                continue
            assert task is world.in_flight[card][0]
            world.finish_first(card, undecoded=4 * len(task.unreadable))
        else:
            world.finish_first(card)
    assert world.finished == [None]
    assert deaths <= 4
    assert world.schedule.failed_rows == 4
    assert not world.quarantined


def read(world: World, task: ShardTask) -> bool:
    """Reads shard 3 as a card does; returns whether it lives."""
    for group, rows in ((0, range(48, 56)), (1, range(56, 64))):
        span = rows
        pieces = [range(row, rows.stop) for row in rows] if group in task.by_row else [rows]
        for piece in pieces:
            if piece.start >= task.unreadable.get(group, (64, ""))[0]:
                break
            if task.announce:
                reading = Reading(group, span, piece, group in task.by_row)
                world.do(world.schedule.handle(ReadingAnnounced(task.attempt, reading)))
            if group == 1 and (len(pieces) == 1 or piece.start >= 60):
                return False
    return True


@pytest.mark.parametrize("cards", [1, 2, 8])
def test_what_one_shard_finds_out_of_a_row_group_costs_the_others_nothing(cards: int) -> None:
    """All shards lie in one row group, of which nothing from row 500 on can be decoded."""
    span, deadly = range(960), 500
    work = shards(60, rows=16)
    world = World(Schedule(work, "a", RowCounts(960)), rows=16)
    start(world, cards)
    deaths = 0

    def lives(task: ShardTask) -> bool:
        piece = range(task.shard.start, task.shard.stop)
        first = task.unreadable.get(0, (960, ""))[0]
        pieces = [range(row, piece.stop) for row in piece if row < first] if 0 in task.by_row else [piece]
        for each in pieces:
            if task.announce:
                world.do(
                    world.schedule.handle(ReadingAnnounced(task.attempt, Reading(0, span, each, 0 in task.by_row)))
                )
            if 0 not in task.by_row or each.start >= deadly:
                return False
        return True

    for _ in range(5000):
        settle(world)
        if world.finished:
            break
        card = busy(world)[deaths % len(busy(world))]
        if not all(map(lives, world.in_flight[card])):
            deaths += 1
            world.die(card)
            continue
        task = world.in_flight[card][0]
        rows = range(task.shard.start, task.shard.stop)
        lost = sum(row >= task.unreadable.get(0, (960, ""))[0] for row in rows)
        world.finish_first(card, undecoded=lost)
    assert world.finished == [None]
    assert world.schedule.failed_rows == 960 - deadly
    assert not world.quarantined
    assert deaths <= 4 * cards, "four of each card that reads it meanwhile, however many shards there are"


def test_a_death_is_put_on_the_shard_that_the_card_made_and_not_on_the_one_that_it_still_stored() -> None:
    work = shards(3, rows=8)
    schedule = Schedule(work, "a", RowCounts(24))
    world = World(schedule, rows=8)
    world.join(0)
    world.ready(0)
    stored, made = world.in_flight[0]
    for task in (stored, made):
        world.do(schedule.handle(ShardBegun(task.attempt, False)))
        world.do(schedule.handle(ShardBegun(task.attempt, True)))
    deaths = 1
    world.die(0)
    for _ in range(100):
        settle(world)
        if world.finished:
            break
        (card,) = busy(world)
        task = world.in_flight[card][0]
        if task.shard is not made.shard or made.shard.start in task.fail_without_running:
            world.finish_first(card, failed=len(task.fail_without_running))
            continue
        rows = [made.shard.start] if made.shard.start in task.alone else range(made.shard.start, made.shard.stop)
        world.do(schedule.handle(BatchAnnounced(task.attempt, ())))
        world.do(schedule.handle(BatchAnnounced(task.attempt, tuple(rows))))
        deaths += 1
        world.die(card)
    assert world.finished == [None]
    assert deaths == 3


def test_a_reading_that_takes_too_long_condemns_no_row() -> None:
    work = shards(2, rows=8)
    schedule = Schedule(work, "a", RowCounts(16))
    world = World(schedule, rows=8)
    start(world, 2)
    for _ in range(50):
        settle(world)
        if world.finished:
            break
        card = busy(world)[0]
        task = world.in_flight[card][0]
        if task.shard.number:
            world.finish_first(card)
            continue
        rows = range(task.shard.start, task.shard.stop)
        if task.announce:
            world.do(schedule.handle(ReadingAnnounced(task.attempt, Reading(0, rows, rows, 0 in task.by_row))))
        assert not task.by_row
        world.in_flight.pop(card)
        world.do(schedule.handle(CardDied(card, "it has been reading for 2400 s (limits.loading)", SlowReading())))
    assert schedule.failed_rows == 0
    assert "it has been reading" in str(world.finished[0])


def test_two_shards_that_find_out_about_each_other_s_row_groups_do_not_wait_for_each_other() -> None:
    """As where rows of two sizes are mixed: both shards touch both groups."""
    buckets = [Bucket(64, 64, 20, 7.5), Bucket(128, 64, 20, 7.5)]
    work = [Shard(number, 0, 0, 16, bucket, 8, 8) for number, bucket in enumerate(buckets)]
    schedule = Schedule(work, "a", RowCounts(16))
    world = World(schedule, rows=8)
    start(world, 2)
    for card in (0, 1):
        world.die(card)  # unannounced
    settle(world)
    holders = {world.in_flight[card][0].shard.number: card for card in busy(world)}
    assert set(holders) == {0, 1}
    for shard, group in ((0, range(8)), (1, range(8, 16))):
        task = world.in_flight[holders[shard]][0]
        world.do(schedule.handle(ReadingAnnounced(task.attempt, Reading(group.start, group, group, by_row=False))))
    for card in holders.values():
        world.die(card)
    let_it_end(world, 9)
    assert world.finished == [None]


def test_storage_that_stalls_while_rows_are_read_condemns_none() -> None:
    work = shards(2, rows=8)
    schedule = Schedule(work, "a", RowCounts(16))
    world = World(schedule, rows=8)
    start(world, 2)
    for _ in range(60):
        settle(world)
        world.check_storage()
        if world.finished:
            break
        card = busy(world)[0]
        task = world.in_flight[card][0]
        if task.announce:
            rows = range(task.shard.start, task.shard.stop)
            world.do(schedule.handle(ReadingAnnounced(task.attempt, Reading(0, rows, rows, 0 in task.by_row))))
        assert not task.by_row
        world.in_flight.pop(card)
        world.do(schedule.handle(CardDied(card, "an operation on storage has not ended for 661 s", StorageStalled())))
    assert schedule.failed_rows == 0
    assert world.finished


def test_one_node_on_which_every_reading_dies_condemns_no_row() -> None:
    world = World(Schedule(shards(50, rows=8), "a", RowCounts(400)), rows=8)
    start(world, 16, per_node=8)
    span = range(400)
    for _ in range(5000):
        settle(world)
        if world.finished:
            break
        card = next((card for card in busy(world) if card < 8), busy(world)[0])
        if card >= 8:
            for task in list(world.in_flight[card]):
                if task.announce:
                    world.do(world.schedule.handle(BatchAnnounced(task.attempt, ())))
            world.finish_first(card)
            continue
        for task in world.in_flight[card]:
            if task.announce:
                rows = range(task.shard.start, task.shard.stop)
                world.do(
                    world.schedule.handle(ReadingAnnounced(task.attempt, Reading(0, span, rows, 0 in task.by_row)))
                )
        world.die(card)
    assert world.finished == [None]
    assert world.schedule.failed_rows == 0


def test_a_batch_that_is_too_slow_for_its_limit_condemns_no_row() -> None:
    work = [Shard(0, 0, 0, 1, LARGE, 1, 1), *(replace(shard, number=shard.number + 1) for shard in shards(60))]
    schedule = Schedule(work, "a", RowCounts(241))
    world = World(schedule)
    start(world, 16, per_node=8)
    slow = SlowBatch(LARGE.batch_kind, "60 s (limits.first_batch)")
    for _ in range(500):
        settle(world)
        if world.finished:
            break
        card = next((c for c in busy(world) if world.in_flight[c][0].shard.number == 0), busy(world)[-1])
        task = world.in_flight[card][0]
        if task.shard.number:
            world.finish_first(card)
            continue
        if task.announce:
            world.do(schedule.handle(BatchAnnounced(task.attempt, ())))
            world.do(schedule.handle(BatchAnnounced(task.attempt, (0,))))
        world.in_flight.pop(card)
        world.do(schedule.handle(CardDied(card, "its batch took longer than 60 s (limits.first_batch)", slow)))
    assert schedule.failed_rows == 0
    assert "batches of 1024x1024, 50 steps take longer" in str(world.finished[0])


def test_a_queued_shard_keeps_nothing_of_a_death_that_it_had_no_part_in() -> None:
    """Its card died while another shard was ahead of it; the row that kills it fails at its own third death."""
    work = shards(3, rows=8)
    schedule = Schedule(work, "a", RowCounts(24))
    world = World(schedule, rows=8)
    world.join(0)
    world.ready(0)
    queued = world.in_flight[0][1].shard
    world.die(0)
    deaths = 0
    for _ in range(100):
        settle(world)
        if world.finished:
            break
        (card,) = busy(world)
        task = world.in_flight[card][0]
        if task.shard is not queued or queued.start in task.fail_without_running:
            world.finish_first(card, failed=len(task.fail_without_running))
            continue
        assert task.announce
        rows = [queued.start] if queued.start in task.alone else range(queued.start, queued.stop)
        world.do(schedule.handle(BatchAnnounced(task.attempt, ())))
        world.do(schedule.handle(BatchAnnounced(task.attempt, tuple(rows))))
        deaths += 1
        world.die(card)
    assert world.finished == [None]
    assert deaths == 3


def test_a_card_is_not_blamed_for_a_death_that_a_queued_shard_explains() -> None:
    """Shards whose reading kills are queued behind healthy ones, which are made elsewhere afterwards."""
    work = shards(120)
    world = World(Schedule(work, "a", RowCounts(480)))
    start(world, 3)
    killers = {task.shard.number for tasks in world.in_flight.values() for task in tasks[1:]} | {20, 40, 60, 80, 100}
    for _ in range(2000):
        settle(world)
        if world.finished:
            break
        card = busy(world)[0]
        deadly = [t for t in world.in_flight[card] if t.shard.number in killers and not t.unreadable]
        if deadly:
            if deadly[0].announce:
                rows = range(deadly[0].shard.start, deadly[0].shard.stop)
                reading = Reading(rows.start, rows, rows, by_row=rows.start in deadly[0].by_row)
                world.do(world.schedule.handle(ReadingAnnounced(deadly[0].attempt, reading)))
            world.die(card)
        else:
            world.finish_first(card, undecoded=4 * len(world.in_flight[card][0].unreadable))
    assert world.finished == [None]
    assert not world.quarantined
    assert world.schedule.failed_rows == 4 * len(killers)


# -- time limits ------------------------------------------------------------------------------------------------


LARGE = Bucket(1024, 1024, 50, 7.5)


def test_a_kind_of_batch_that_no_card_makes_in_time_is_the_job_s_mistake() -> None:
    work = [
        Shard(number, 0, 4 * number, 4 * number + 4, LARGE if number % 5 == 4 else Bucket(64, 64, 20, 7.5), 4, 4)
        for number in range(40)
    ]
    world = World(Schedule(work, "a", RowCounts(160)))
    start(world, 4)
    slow = SlowBatch(LARGE.batch_kind, "60 s (limits.first_batch)")
    kills = 0
    for _ in range(1000):
        settle(world)
        if world.finished:
            break
        ahead = {card: world.in_flight[card][0].shard.bucket for card in busy(world)}
        card = next((card for card, bucket in ahead.items() if bucket != LARGE), None)
        if card is not None:
            world.finish_first(card)
            continue
        card = next(iter(ahead))
        task = world.in_flight[card][0]
        if task.announce:
            world.do(world.schedule.handle(BatchAnnounced(task.attempt, ())))
        kills += 1
        world.in_flight.pop(card)
        world.do(world.schedule.handle(CardDied(card, "its batch took longer than 60 s (limits.first_batch)", slow)))
    assert len(world.committed) == 32, "the others go on"
    assert world.schedule.failed_rows == 0
    assert not world.quarantined
    assert kills <= 2 + 4, "those that had begun one by then"
    (reason,) = world.finished
    assert reason == (
        "batches of 1024x1024, 50 steps take longer than 60 s (limits.first_batch); 8 shards are not made"
    )


def test_two_cards_of_one_node_set_no_kind_of_batch_aside_while_there_are_others() -> None:
    work = shards(80)
    schedule = Schedule(work, "a", RowCounts(320))
    world = World(schedule)
    start(world, 8, per_node=4)
    slow = SlowBatch(work[0].bucket.batch_kind, "60 s (limits.first_batch)")
    world.finish_first(0)
    for card in (0, 1, 2):
        world.in_flight.pop(card)
        world.do(schedule.handle(CardDied(card, "hung", slow)))
    assert not schedule.stuck
    world.in_flight.pop(4)
    world.do(schedule.handle(CardDied(4, "hung", slow)))
    assert schedule.stuck, "two nodes say so"
    world.finish_first(5)
    assert not schedule.stuck, "and a card has made one after all"
    let_it_end(world, 99)
    assert world.finished == [None]


def test_one_card_that_hangs_says_nothing_of_a_kind_of_batch() -> None:
    work = shards(20)
    schedule = Schedule(work, "a", RowCounts(80))
    world = World(schedule)
    start(world, 3)
    world.finish_first(0)
    kind = world.in_flight[0][0].shard.bucket.batch_kind
    for _ in range(2):
        world.in_flight.pop(0)
        world.do(schedule.handle(CardDied(0, "hung", SlowBatch(kind, "60 s (limits.first_batch)"))))
        settle(world)
        while not world.in_flight[0]:
            world.finish_first(busy(world)[0])
            settle(world)
    assert not schedule.stuck


def test_a_kind_of_batch_that_all_cards_hang_at_is_named_where_there_is_no_other() -> None:
    world = World(Schedule(shards(6), "a", RowCounts(24)))
    start(world, 3)
    slow = SlowBatch(world.in_flight[0][0].shard.bucket.batch_kind, "60 s (limits.first_batch)")
    for card in range(3):
        assert not world.finished
        world.in_flight.pop(card)
        world.do(world.schedule.handle(CardDied(card, "its first batch took longer than 60 s", slow)))
    let_it_end(world, 9)
    reason = "batches of 64x64, 20 steps take longer than 60 s (limits.first_batch); 6 shards are not made"
    assert world.finished == [reason]
    assert not world.quarantined


# -- memory of the device ---------------------------------------------------------------------------------------


def no_memory(world: World, card: int, texts_differ: bool = False) -> CardBroken:
    """The device of a card has no memory for a batch of the shard that it is at."""
    shard = world.in_flight.pop(card)[0].shard
    large = LargeBatch(shard.bucket.batch_kind, 8, shard.number, texts_differ)
    return CardBroken(card, "out of device memory", large=large)


def play(world: World, fits: Callable[[Shard], bool], texts_differ: bool = False) -> int:
    """Plays a run whose devices have no memory for some shards; returns how often they had none."""
    broken = 0
    for _ in range(2000):
        settle(world)
        if world.finished:
            break
        card = busy(world)[0]
        if fits(world.in_flight[card][0].shard):
            world.finish_first(card)
        else:
            broken += 1
            world.do(world.schedule.handle(no_memory(world, card, texts_differ)))
    return broken


def test_a_size_for_which_no_device_has_memory_is_set_aside_and_the_others_go_on() -> None:
    work = [
        Shard(number, 0, 4 * number, 4 * number + 4, LARGE if number % 5 == 0 else Bucket(64, 64, 20, 7.5), 4, 4)
        for number in range(40)
    ]
    world = World(Schedule(work, "a", RowCounts(160)))
    start(world, 4)
    broken = play(world, lambda shard: shard.bucket != LARGE)
    assert len(world.committed) == 32, "the others go on"
    assert world.schedule.failed_rows == 0
    assert not world.quarantined
    assert broken <= 2 + 3, "those that had begun one by then"
    assert world.finished == [
        "no device has memory for batches of 8 images of 1024x1024 with guidance; a --batch-size of 4, in a new output,"
        " may fit; 8 shards are not made"
    ]


def test_one_card_that_runs_out_of_memory_twice_says_enough_where_there_is_no_other() -> None:
    work = [Shard(number, 0, 4 * number, 4 * number + 4, LARGE, 4, 4) for number in range(3)]
    world = World(Schedule(work, "a", RowCounts(12)))
    start(world, 1)
    for _ in range(2):
        assert not world.finished
        settle(world)
        world.do(world.schedule.handle(no_memory(world, 0)))
    let_it_end(world, 9)
    (reason,) = world.finished
    assert str(reason).startswith("no device has memory for batches of 8 images of 1024x1024 with guidance; ")


def test_a_card_that_has_less_memory_than_the_others_is_quarantined_alone() -> None:
    work = [Shard(number, 0, 4 * number, 4 * number + 4, LARGE, 4, 4) for number in range(40)]
    world = World(Schedule(work, "a", RowCounts(160)))
    start(world, 3)
    world.finish_first(1)
    for _ in range(200):
        settle(world)
        if world.finished:
            break
        if world.in_flight.get(0):
            world.do(world.schedule.handle(no_memory(world, 0)))
        else:
            world.finish_first(busy(world)[0])
    assert world.finished == [None]
    assert list(world.quarantined) == [0]


@pytest.mark.parametrize("cards", [1, 2, 4, 8])
def test_many_sizes_for_which_no_device_has_memory_cost_no_card(cards: int) -> None:
    sizes = [Bucket(1024 + 64 * (number % 5), 1024, 10 + number, 7.5) for number in range(50)]
    buckets = sizes + [Bucket(64, 64, 20, 7.5)] * 10
    work = [Shard(number, 0, 4 * number, 4 * number + 4, bucket, 4, 4) for number, bucket in enumerate(buckets)]
    world = World(Schedule(work, "a", RowCounts(240)))
    start(world, cards)
    broken = play(world, lambda shard: shard.bucket.width == 64)
    assert len(world.committed) == 10
    assert not world.quarantined
    assert broken <= 5 * 3 + cards
    (reason,) = world.finished
    assert "; and 2 more such; 50 shards are not made" in str(reason)


@pytest.mark.parametrize("cards", [1, 2, 4, 8])
def test_shards_that_are_larger_than_others_of_their_size_cost_no_card(cards: int) -> None:
    """Their texts are longer, of which the plan knows nothing."""
    work = [Shard(number, 0, 4 * number, 4 * number + 4, LARGE, 4, 4) for number in range(60)]
    world = World(Schedule(work, "a", RowCounts(240)))
    start(world, cards)
    broken = play(world, lambda shard: shard.number % 5 != 1)
    assert len(world.committed) == 48
    assert not world.quarantined
    assert broken <= 2 * 12
    assert "images of rows of shard" in str(world.finished[0])


@pytest.mark.parametrize("cards", [1, 2, 4])
@pytest.mark.parametrize(("long", "made"), [(4, 36), (40, 0)])
def test_long_texts_that_come_first_set_no_size_aside_before_several_have_failed(
    cards: int, long: int, made: int
) -> None:
    work = [Shard(number, 0, 4 * number, 4 * number + 4, LARGE, 4, 4) for number in range(40)]
    world = World(Schedule(work, "a", RowCounts(160)))
    start(world, cards)
    broken = play(world, lambda shard: shard.number >= long, texts_differ=True)
    assert len(world.committed) == made
    assert not world.quarantined
    assert broken <= 3 * 9 + cards
    assert "no device has memory" in str(world.finished[0])


def test_one_card_of_several_sets_no_size_aside() -> None:
    work = [Shard(number, 0, 4 * number, 4 * number + 4, LARGE, 4, 4) for number in range(30)]
    world = World(Schedule(work, "a", RowCounts(120)))
    start(world, 3)
    for _ in range(3):
        settle(world)
        if world.in_flight.get(0):
            world.do(world.schedule.handle(no_memory(world, 0)))
    for _ in range(200):
        settle(world)
        if world.finished:
            break
        world.finish_first(busy(world)[-1])
    assert world.finished == [None]
    assert len(world.committed) == 30


# -- images that come out wrong ---------------------------------------------------------------------------------


def test_a_row_that_one_card_doubts_and_another_makes_is_made() -> None:
    world = World(Schedule(shards(6), "a", RowCounts(24)))
    start(world, 2)
    shard = world.in_flight[0][0].shard
    world.finish_first(0, failed=1, doubted={shard.start: "black"})
    assert not world.commits, "its record waits"
    while not world.in_flight[1][0].confirm:
        world.finish_first(1)
        settle(world)
    assert world.in_flight[1][0].shard is shard
    assert world.in_flight[1][0].confirm == {shard.start}
    world.finish_first(1)  # it makes the row
    assert not any(number == shard.number for number, _ in world.commits)
    let_it_end(world, 9)
    assert world.finished == [None]
    assert world.schedule.failed_rows == 0
    assert not world.held, "the first record is dropped"


def test_a_row_that_two_cards_make_wrong_fails_and_its_shard_is_not_made_again() -> None:
    world = World(Schedule(shards(6), "a", RowCounts(24)))
    start(world, 2)
    shard = world.in_flight[0][0].shard
    attempt = world.in_flight[0][0].attempt
    world.finish_first(0, failed=1, doubted={shard.start: "black"})
    while not world.in_flight[1][0].confirm:
        world.finish_first(1)
        settle(world)
    world.finish_first(1, failed=1)
    assert (shard.number, attempt) in world.commits
    let_it_end(world, 9)
    assert world.schedule.failed_rows == 1
    assert not world.quarantined


def test_a_row_is_confirmed_by_a_card_that_has_its_graph_if_there_is_one() -> None:
    buckets = [Bucket(64, 64, 20, 7.5), Bucket(128, 64, 20, 7.5)]
    work = [Shard(number, 0, 4 * number, 4 * number + 4, buckets[number % 2], 4, 4) for number in range(12)]
    world = World(Schedule(work, "a", RowCounts(48)))
    start(world, 4)
    first = next(card for card in range(4) if world.in_flight[card][0].shard.bucket == buckets[1])
    holders = {card for card in range(4) if world.in_flight[card][0].shard.bucket == buckets[1]} - {first}
    assert holders
    while any(len(tasks) > 1 for card, tasks in world.in_flight.items() if card != first):
        world.finish_first(next(card for card, tasks in world.in_flight.items() if card != first and len(tasks) > 1))
        settle(world)
    world.finish_first(first, failed=1, doubted={world.in_flight[first][0].shard.start: "black"})
    settle(world)
    confirming = [card for card, tasks in world.in_flight.items() for task in tasks if task.confirm]
    assert set(confirming) <= holders
    assert confirming


def test_where_no_other_card_can_be_had_the_same_one_has_a_second_try() -> None:
    world = World(Schedule(shards(1), "a", RowCounts(4)))
    start(world, 1)
    start_row = world.in_flight[0][0].shard.start
    world.finish_first(0, failed=1, doubted={start_row: "black"})
    assert world.in_flight[0][0].confirm == {start_row}
    world.finish_first(0, failed=1)
    settle(world)
    assert world.finished == [None]
    assert world.schedule.failed_rows == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_card_that_now_and_then_paints_wrong_is_quarantined_and_costs_no_row(seed: int) -> None:
    """2 % of its images are wrong, each time anew; the others make none wrong."""
    rng = random.Random(seed)
    work = shards(400, rows=16)
    world = World(Schedule(work, "a", RowCounts(6400)), rows=16)
    start(world, 8)
    for _ in range(10_000):
        settle(world)
        if world.finished:
            break
        card = rng.choice(busy(world))
        task = world.in_flight[card][0]
        wrong = [row for row in range(task.shard.start, task.shard.stop) if card == 3 and rng.random() < 0.02]
        twice = {row: "black" for row in wrong if rng.random() < 0.02}
        if task.confirm:
            world.finish_first(card)
        else:
            world.finish_first(card, failed=len(twice), doubted=twice, transient_failures=len(wrong) - len(twice))
    assert world.finished == [None]
    assert world.schedule.failed_rows == 0
    assert world.quarantined == {3}


def test_the_last_card_goes_on_though_it_paints_wrong_now_and_then() -> None:
    world = World(Schedule(shards(100), "a", RowCounts(400)))
    start(world, 2)
    for _ in range(20):
        world.finish_first(0)
        settle(world)
    world.leave(0)
    while not world.finished:
        settle(world)
        if not world.finished:
            world.finish_first(1, transient_failures=1)
    assert world.finished == [None]
    assert not world.quarantined


@pytest.mark.parametrize("cards", [2, 8, 200])
@pytest.mark.parametrize("share", [0.0005, 0.005, 0.02])
def test_cards_that_all_paint_wrong_as_often_are_not_quarantined(cards: int, share: float) -> None:
    """It is the model, then; and among many cards one is the unluckiest."""
    rng = random.Random(0)
    world = World(Schedule(shards(10 * cards, rows=64), "a", RowCounts(640 * cards)), rows=64)
    start(world, cards)
    while not world.finished:
        settle(world)
        if world.finished:
            break
        wrong = sum(rng.random() < share for _ in range(64))
        world.finish_first(rng.choice(busy(world)), transient_failures=wrong)
    assert not world.quarantined


# -- rows that can't be decoded, and rows that can't be run -----------------------------------------------------


def test_a_row_group_that_one_card_can_t_decode_is_tried_by_another() -> None:
    world = World(Schedule(shards(6), "a", RowCounts(24)))
    start(world, 2)
    task = world.in_flight[0].pop(0)
    world.do(
        world.schedule.handle(
            ShardFailed(task.attempt, ShardFailure("can't be decoded", undecoded={0: "malloc failed"}))
        )
    )
    while world.in_flight[1][0].shard is not task.shard:
        world.finish_first(1)
        settle(world)
    second = world.in_flight[1][0]
    assert second.undecoded == {0: "malloc failed"}
    let_it_end(world, 9)
    assert world.schedule.failed_rows == 0


@pytest.mark.parametrize(("undecoded", "blamed"), [(4, False), (0, True)])
def test_a_card_is_blamed_for_what_it_can_t_decode_only_if_others_can(undecoded: int, blamed: bool) -> None:
    world = World(Schedule(shards(60), "a", RowCounts(240)))
    start(world, 3)
    for _ in range(1000):
        settle(world)
        if world.finished:
            break
        card = busy(world)[0]
        task = world.in_flight[card][0]
        if card == 0 and not task.undecoded and task.shard.number % 4 == 0:
            world.in_flight[card].pop(0)
            failure = ShardFailure("can't be decoded", undecoded={0: "corrupt"})
            world.do(world.schedule.handle(ShardFailed(task.attempt, failure)))
        else:
            world.finish_first(card, undecoded=undecoded if task.undecoded else 0)
    assert world.finished == [None]
    assert world.quarantined == ({0} if blamed else set())


def test_rows_that_never_reach_a_pipeline_do_not_say_that_the_job_is_wrong() -> None:
    work = shards(40, rows=256)
    world = World(Schedule(work, "a", RowCounts(40 * 256)), rows=256)
    start(world, 2)
    first = world.in_flight[0].pop(0)
    world.held[first.attempt] = first.shard.number
    world.do(world.schedule.handle(ShardMade(first.attempt, ShardOutcome(256, failed_rows=256, raised_rows=0))))
    let_it_end(world, 9)
    assert world.finished == [None]


def test_a_card_that_is_moved_to_another_node_begins_with_a_clean_record() -> None:
    schedule = Schedule(shards(4), "a", RowCounts(16))
    schedule.handle(CardPlaced(0, "first"))
    schedule.handle(CardBroken(0, "no such module"))
    schedule.handle(loaded(0, "second"))
    decisions = schedule.handle(CardBroken(0, "out of memory"))
    assert not any(isinstance(decision, Quarantine) for decision in decisions)


def test_the_check_of_storage_names_the_shard() -> None:
    schedule = Schedule(shards(4), "a", RowCounts(16))
    schedule.handle(CardPlaced(0, "first"))
    assign = next(each for each in schedule.handle(loaded(0, "first")) if isinstance(each, Assign))
    decisions = schedule.handle(ShardFailed(assign.task.attempt, REFUSED))
    assert [d for d in decisions if isinstance(d, CheckStorage)] == [CheckStorage(assign.task.shard)]


def test_a_shard_that_its_card_had_not_begun_keeps_nothing_of_the_loss_of_a_node() -> None:
    schedule = Schedule(shards(1), "a", RowCounts(4))
    world = World(schedule)
    world.see(more=1)
    for card in range(4):
        world.join(card)
        world.ready(card)
        assert not world.in_flight[card][0].announce
        world.leave(card)  # before it has begun anything


def test_a_card_that_has_made_no_image_where_it_is_now_is_judged_by_none() -> None:
    failures = TransientFailures()
    failures.add(Card(0, "first"), 100, 0)
    moved = Card(1, "second")
    failures.add(moved, 0, 3)
    assert failures.verdict(moved, 2) is None
