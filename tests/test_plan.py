"""The plan holds every row once, never mixes buckets, and ends in small shards, of sizes that suit the cards."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.plan import Bucket, RowSpan, summarize
from gaudi_batch.planner import (
    MAX_IMAGES,
    MAX_SHARDS,
    MAX_WORK,
    PARTS_OF_SHARE,
    TAIL_DIVISOR,
    ShardSizes,
    plan_shards,
)

BUCKETS = [Bucket(64, 64, 20, 7.5), Bucket(64, 64, 20, 1.0), Bucket(128, 64, 20, 7.5)]


@st.composite
def datasets(draw: st.DrawFn) -> list[RowSpan]:
    """Runs as a dataset of up to four files gives them, neighbours differing."""
    runs: list[RowSpan] = []
    for file in range(draw(st.integers(1, 4))):
        start = 0
        for count in draw(st.lists(st.integers(1, 60), max_size=12)):
            runs.append(RowSpan(file, start, count, draw(st.sampled_from(BUCKETS)), draw(st.integers(0, 3))))
            start += count
    return runs


@given(datasets(), st.integers(1, 100), st.integers(1, 9), st.integers(1, 4))
def test_every_row_is_in_one_shard_of_its_own_bucket(
    runs: list[RowSpan], shard_size: int, batch_size: int, num_images: int
) -> None:
    total = sum(run.rows for run in runs)
    shards = list(plan_shards(runs, total, ShardSizes(batch_size, num_images, shard_size)))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    bucket_of = {(run.file, run.start + i): run for run in runs for i in range(run.rows)}
    seen: Counter[tuple[int, int]] = Counter()
    for shard in shards:
        places = [
            (shard.file, row)
            for row in range(shard.start, shard.stop)
            if bucket_of[shard.file, row].bucket == shard.bucket
        ]
        assert len(places) == shard.rows > 0
        assert shard.images == sum(bucket_of[place].num_images for place in places)
        seen.update(places)
    assert seen == Counter(dict.fromkeys(bucket_of, 1))


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 16), st.integers(1, 4))
def test_one_file_without_shapes_is_cut_into_whole_batches(
    rows: int, shard_size: int, batch_size: int, num_images: int
) -> None:
    sizes = ShardSizes(batch_size, num_images, shard_size)
    shards = list(plan_shards([RowSpan(0, 0, rows, BUCKETS[0], num_images)], rows, sizes))
    assert all(shard.images % batch_size == 0 for shard in shards[:-1])
    unit = batch_size // math.gcd(batch_size, num_images)
    assert max(shard.rows for shard in shards) <= max(unit, shard_size + unit)
    (summary,) = summarize(shards, batch_size).values()
    assert summary.rows == rows
    assert summary.padding < batch_size


def test_the_last_tenth_is_in_small_shards() -> None:
    shards = list(plan_shards([RowSpan(0, 0, 10_000, BUCKETS[0], 1)], 10_000, ShardSizes(8, rows=256)))
    assert {shard.rows for shard in shards if shard.start < 8900} == {256}
    assert {shard.rows for shard in shards[:-1] if shard.start >= 9000} == {256 // TAIL_DIVISOR}


def test_a_plan_costs_nothing_per_row_without_shapes() -> None:
    shards = sum(1 for _ in plan_shards([RowSpan(0, 0, 10**8, BUCKETS[0], 1)], 10**8, ShardSizes(8, rows=100_000)))
    assert shards == 900 + 400


@given(datasets(), st.integers(1, 9), st.integers(1, 4), st.integers(1, 50))
def test_sizes_that_follow_the_cards_hold_every_row_once(
    runs: list[RowSpan], batch_size: int, num_images: int, cards: int
) -> None:
    total = sum(run.rows for run in runs)
    shards = list(plan_shards(runs, total, ShardSizes(batch_size, num_images, cards=cards)))
    rows = Counter((shard.file, shard.bucket) for shard in shards for _ in range(shard.rows))
    assert rows == Counter((run.file, run.bucket) for run in runs for _ in range(run.rows))
    assert sum(shard.images for shard in shards) == sum(run.rows * run.num_images for run in runs)
    assert all(shard.rows > 0 for shard in shards)


@given(st.integers(1, 10**6), st.integers(1, 32), st.integers(1, 1000))
def test_shards_shrink_to_single_batches_and_are_no_larger_than_a_part_of_a_cards_share(
    rows: int, batch_size: int, cards: int
) -> None:
    shards = list(plan_shards([RowSpan(0, 0, rows, BUCKETS[0], 1)], rows, ShardSizes(batch_size, cards=cards)))
    images = [shard.images for shard in shards]
    assert all(later <= before for before, later in itertools.pairwise(images)), "they only shrink"
    assert images[0] <= max(batch_size, rows / (cards * PARTS_OF_SHARE))
    assert images[-1] <= batch_size
    assert len(shards) < MAX_SHARDS + cards * PARTS_OF_SHARE
    if rows > cards * PARTS_OF_SHARE * batch_size:
        last_round = images[-cards:]
        assert max(last_round) <= batch_size, "what the cards do last takes them one batch each"


def test_the_defaults_give_every_card_of_a_small_job_work() -> None:
    shards = list(plan_shards([RowSpan(0, 0, 200, BUCKETS[0], 1)], 200, ShardSizes(8, cards=8)))
    assert [shard.images for shard in shards] == [8] * 25


def test_a_shard_is_counted_in_images_and_not_in_rows() -> None:
    runs = [RowSpan(0, 0, 100, BUCKETS[0], 10_000)]
    shards = list(plan_shards(runs, 100, ShardSizes(8, 10_000, cards=2)))
    assert {(shard.rows, shard.images) for shard in shards} == {(1, 10_000)}, "a row is never split"
    runs = [RowSpan(0, 0, 64, BUCKETS[0], 1), RowSpan(0, 64, 64, BUCKETS[0], 50)]
    sizes = [shard.images for shard in plan_shards(runs, 128, ShardSizes(8, cards=1))]
    assert max(sizes) <= sum(sizes) / 8, "rows of many images fill a shard as they come"


def one_after_the_other(asked: Sequence[int]) -> list[RowSpan]:
    """The spans of rows that ask for so many images each."""
    spans, start = [], 0
    for images, group in itertools.groupby(asked):
        rows = len(list(group))
        spans.append(RowSpan(0, start, rows, BUCKETS[0], images))
        start += rows
    return spans


ANY = random.Random(0)


@pytest.mark.parametrize(
    ("asked", "cards", "batch_size", "most_padding"),
    [
        ([3] * 200, 8, 8, 0.06),
        ([10] * 200, 8, 8, 0.03),
        ([7] * 200, 8, 8, 0.10),
        ([3] * 20_000, 64, 8, 0.01),
        ([3] * 20_000, 64, 32, 0.03),
        ([10] * 20_000, 64, 32, 0.03),
        ([1, 2] * 2_560, 16, 8, 0.06),
        ([ANY.randint(1, 10) for _ in range(5_000)], 16, 8, 0.06),
        ([ANY.randint(1, 100) for _ in range(1_000)], 8, 8, 0.02),
        ([1] * 1_000 + [100] + [1] * 5_399, 64, 8, 0.01),
        ([10] * 300 + [0] + [10] * 339, 64, 8, 0.08),
        ([0] + [3] * 20_000, 64, 8, 0.01),
    ],
    ids=lambda value: f"{len(value)} rows" if isinstance(value, list) else str(value),
)
def test_rows_of_several_images_fill_batches_and_cards_finish_together(
    asked: list[int], cards: int, batch_size: int, most_padding: float
) -> None:
    """Each next shard goes to the card that is free first. No card makes more than a twentieth more batches, and two,
    than if the images could be given out one by one."""
    sizes = ShardSizes(batch_size, asked[0], cards=cards)
    shards = list(plan_shards(one_after_the_other(asked), len(asked), sizes))
    assert (sum(shard.rows for shard in shards), sum(shard.images for shard in shards)) == (len(asked), sum(asked))
    batches = [-(-shard.images // batch_size) for shard in shards]
    least = -(-sum(asked) // batch_size)
    assert sum(batches) <= least * (1 + most_padding)
    free = [0] * cards
    for count in batches:
        heapq.heapreplace(free, free[0] + count)
    assert max(free) <= 1.05 * least / cards + 2


def test_a_shard_is_no_more_than_some_minutes_of_work() -> None:
    large = Bucket(1024, 1024, 50, 7.0)
    shards = list(plan_shards([RowSpan(0, 0, 10**5, large, 1)], 10**5, ShardSizes(4, cards=2)))
    assert shards[0].images <= MAX_WORK / large.work < 50
    small = list(plan_shards([RowSpan(0, 0, 10**6, BUCKETS[0], 1)], 10**6, ShardSizes(4, cards=2)))
    assert small[0].images == MAX_IMAGES


@pytest.mark.thorough
def test_a_hundred_million_prompts_are_under_a_million_shards() -> None:
    plan = plan_shards([RowSpan(0, 0, 10**8, BUCKETS[0], 1)], 10**8, ShardSizes(8, cards=10_000))
    last = deque(plan, maxlen=1)[0]
    assert last.number < 10**6
    assert last.images <= 24
