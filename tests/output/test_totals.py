"""Rates of cards that work at one time or one after the other, on clocks that differ."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pytest

from gaudi_batch.card.clock import DriverClock
from gaudi_batch.output import manifest
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.output.totals import CommitTotals


def rate(*commits: tuple[str, float, float, int]) -> float | None:
    """The rate of a run whose cards each finished a shard at a time that took them so long and had so many images."""
    totals = CommitTotals()
    for shard, (card, finished_at, seconds, images) in enumerate(commits):
        sums = ThroughputTotals(batches=1, images=images, steady_images=images, steady_s=seconds)
        totals.add(CommitInfo(shard, f"aaaaa{shard}", card, "node", 0, images, 0, images, sums), finished_at)
    images_per_s: float | None = totals.describe({}, 0)["images_per_s"]
    return images_per_s


def test_cards_at_work_at_one_time_add_up_and_successive_ones_do_not() -> None:
    assert rate(*((f"card {number}", 10.0, 10.0, 10) for number in range(5))) == 5.0
    assert rate(*((f"card {number}", 10.0 * number, 10.0, 10) for number in range(5))) == 1.0
    assert rate(*(("card", 10.0 * number, 10.0, 10) for number in range(5))) == 1.0


def test_the_rate_is_an_average_over_the_time_at_work() -> None:
    assert rate(("a", 10.0, 10.0, 10), ("b", 5.0, 5.0, 5)) == 1.5, "two cards half of the time, one the other half"
    assert rate(("a", 10.0, 10.0, 10), ("a", 1010.0, 10.0, 10)) == 1.0, "a night between two drivers is no time at work"
    assert rate(("a", 10.0, 10.0, 10), ("b", 10.0, 0.0, 0)) == 1.0, "a card that made nothing has no rate"
    assert rate() is None


def test_waiting_is_part_of_the_time_at_work_and_not_of_a_rate() -> None:
    totals = CommitTotals()
    for shard, card in enumerate("ab"):
        sums = ThroughputTotals(batches=2, images=10, steady_images=5, steady_s=5.0, warmup_s=2.0, wait_s=3.0)
        totals.add(CommitInfo(shard, f"aaaaa{shard}", card, "node", 0, 10, 0, 10, sums), 10.0)
    assert totals.images_per_s == 2.0


@pytest.mark.parametrize("skew", [120.0, -120.0, 3600.0])
def test_clocks_of_nodes_that_differ_do_not_change_the_rate(skew: float) -> None:
    """Two cards of 1 image/s side by side, each five shards of 10 s; the clock of one node is wrong."""
    totals = CommitTotals()
    for shard in range(10):
        now, off = 1e9 + 10.0 * (shard // 2), skew * (shard % 2)
        clock = DriverClock(itertools.repeat(now + off).__next__)
        clock.hear(now)
        sums = ThroughputTotals(batches=1, images=10, steady_images=10, steady_s=10.0)
        card, finished = f"card {shard % 2}", clock.convert(now + off)
        info = CommitInfo(shard, f"aaaaa{shard}", card, "n", 0, 0, 0, 10, sums, finished_at=finished)
        table, info = manifest.read(manifest.build([], pa.table({}), {}, {}, 0, info))
        totals.add(info, manifest.finished_at(table, info))
    assert totals.images_per_s == pytest.approx(2.0)
