"""The plan holds every row once, never mixes buckets, and ends in small shards."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.plan import TAIL_DIVISOR, Bucket, RowSpan, plan_shards, summarize

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
    shards = list(plan_shards(runs, total, shard_size, batch_size, num_images))
    assert [shard.number for shard in shards] == list(range(len(shards)))
    bucket_of = {(run.file, run.start + i): run for run in runs for i in range(run.rows)}
    seen: Counter[tuple[int, int]] = Counter()
    for shard in shards:
        mine = [
            (shard.file, row)
            for row in range(shard.start, shard.stop)
            if bucket_of[shard.file, row].bucket == shard.bucket
        ]
        assert len(mine) == shard.rows > 0
        assert shard.images == sum(bucket_of[place].num_images for place in mine)
        seen.update(mine)
    assert seen == Counter(dict.fromkeys(bucket_of, 1))


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 16), st.integers(1, 4))
def test_one_file_without_shapes_is_cut_into_whole_batches(
    rows: int, shard_size: int, batch_size: int, num_images: int
) -> None:
    shards = list(plan_shards([RowSpan(0, 0, rows, BUCKETS[0], num_images)], rows, shard_size, batch_size, num_images))
    assert all(shard.images % batch_size == 0 for shard in shards[:-1])
    unit = batch_size // math.gcd(batch_size, num_images)
    assert max(shard.rows for shard in shards) <= max(unit, shard_size + unit)
    (summary,) = summarize(shards, batch_size).values()
    assert summary.rows == rows
    assert summary.padding < batch_size


def test_the_last_tenth_is_in_small_shards() -> None:
    shards = list(plan_shards([RowSpan(0, 0, 10_000, BUCKETS[0], 1)], 10_000, 256, 8))
    assert {shard.rows for shard in shards if shard.start < 8900} == {256}
    assert {shard.rows for shard in shards[:-1] if shard.start >= 9000} == {256 // TAIL_DIVISOR}


def test_a_plan_costs_nothing_per_row_without_shapes() -> None:
    shards = sum(1 for _ in plan_shards([RowSpan(0, 0, 10**8, BUCKETS[0], 1)], 10**8, 100_000, 8))
    assert shards == 900 + 400
