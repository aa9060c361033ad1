"""Cards stay in a row group, so each group is decoded by few of them; and shards are sized so that they can."""

from __future__ import annotations

import itertools

import pytest
from test_affinity import simulate
from world import loaded

from gaudi_batch.plan import Bucket, GroupRows, RowSpan, Shard
from gaudi_batch.planner import PARTS_OF_SHARE, ShardSizes, plan_shards
from gaudi_batch.scheduling.decisions import Assign, ShardTask
from gaudi_batch.scheduling.events import CardPlaced
from gaudi_batch.scheduling.fresh import FreshShards, Readers
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules

BATCH = 4
BUCKETS = [Bucket(64, 64, 20, 7.5), Bucket(96, 64, 20, 7.5)]


def plan(groups: int, rows: int, cards: int, buckets: int = 1) -> list[Shard]:
    """Shards of a file of row groups of so many rows each, whose buckets take turns every 16 rows."""
    spans = [
        RowSpan(0, group * rows + row, min(16, rows - row), BUCKETS[row // 16 % buckets], 1, group)
        for group in range(groups)
        for row in range(0, rows, 16)
    ]
    ranges = [GroupRows(0, group, group * rows, (group + 1) * rows) for group in range(groups)]
    return list(plan_shards(spans, groups * rows, ShardSizes(BATCH, cards=cards, groups=ranges)))


def decoded(groups: int, rows: int, cards: int) -> float:
    """How often a row group is decoded, on average, where a card keeps the last one."""
    shards = plan(groups, rows, cards)
    schedule = Schedule(shards, "a", RowCounts(groups * rows), Rules(batch_size=BATCH))
    given: dict[int, list[ShardTask]] = {}
    simulate(schedule, cards, 0.0, given)
    assert sum(len(tasks) for tasks in given.values()) >= len(shards)
    return sum(len(list(itertools.groupby(task.shard.group for task in tasks))) for tasks in given.values()) / groups


@pytest.mark.parametrize(("groups", "cards", "most"), [(32, 64, 4.0), (32, 8, 1.5), (200, 16, 1.2), (1, 8, 8.0)])
def test_a_row_group_is_decoded_by_few_cards(groups: int, cards: int, most: float) -> None:
    assert decoded(groups, 400, cards) <= most


def test_a_card_whose_process_is_new_has_no_row_group_yet() -> None:
    schedule = Schedule(plan(2, 400, 2), "a", RowCounts(800), Rules(batch_size=BATCH))
    first: dict[int, int] = {}
    for card in range(2):
        for event in (CardPlaced(card), loaded(card)):
            for decision in schedule.handle(event):
                if isinstance(decision, Assign):
                    first.setdefault(decision.card, decision.task.shard.group)
    assert sorted(first.values()) == [0, 1], "each begins a group of its own"
    assert {schedule._work.pending.readers.cards((0, group)) for group in range(2)} == {1}


def test_row_groups_that_are_made_side_by_side_get_shards_that_shrink_together() -> None:
    shards = plan(8, 10_000, 8)
    of_group = [[shard.images for shard in shards if shard.group == group] for group in range(8)]
    for sizes in of_group:
        assert sizes[0] == 80_000 // (8 * PARTS_OF_SHARE) // BATCH * BATCH
        assert all(later <= before for before, later in itertools.pairwise(sizes))
        assert sizes[-1] <= BATCH
    later = plan(16, 10_000, 8)
    first, last = (next(shard.images for shard in later if shard.group == group) for group in (0, 15))
    assert last < first, "groups that are made after others begin with smaller shards"


@pytest.mark.parametrize("buckets", [1, 2])
def test_a_shard_ends_with_its_row_group_where_that_costs_little_padding(buckets: int) -> None:
    shards = plan(16, 1001, 4, buckets)
    padding = sum(-shard.images % BATCH for shard in shards)
    assert padding <= 0.01 * 16 * 1001
    crossing = [shard for shard in shards if (shard.stop - 1) // 1001 != shard.group]
    assert not crossing, "each has more than BATCHES_BEFORE_CUT batches of a bucket"
    small = plan(64, 30, 4, buckets)
    assert sum(-shard.images % BATCH for shard in small) <= 0.01 * 64 * 30 + BATCH * buckets
    assert any((shard.stop - 1) // 30 != shard.group for shard in small), "small groups are put together"


@pytest.mark.parametrize(("sizes", "group"), [([8, 8], 0), ([12, 12], 1), ([8], 1)])
def test_a_card_leaves_its_row_group_for_one_whose_shards_are_far_larger(sizes: list[int], group: int) -> None:
    """So that the large ones are not made last; but not for the last shard of its own."""
    fresh, readers = FreshShards(), Readers()
    of_group = {0: [40, 40, 40], 1: [40, *sizes]}
    for number, (where, images) in enumerate((place, size) for place in of_group for size in of_group[place]):
        fresh.add(Shard(number, 0, number, number + 1, BUCKETS[0], images, images, group=where))
    for card in range(2):
        assert fresh.take(card, readers) == 3 * card
        readers.move(card, (0, card))
    assert fresh.take(1, readers) == (1 if group == 0 else 4)
    assert fresh.images == 160 + sum(sizes) - 80 - (40 if group == 0 else sizes[0])
