"""Figures that decide who gets what and what a plan comes to, against sums made by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
from world import shards

from gaudi_batch.plan import BatchKind, Bucket, GraphKey, PlanSummary, RowSpan, Shard, summarize
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.scheduling.affinity import Affinity
from gaudi_batch.scheduling.cards import Card, Cards, CardState
from gaudi_batch.scheduling.dispatch import NODES_PER_EXCLUSIVE, Dispatch
from gaudi_batch.scheduling.events import SlowBatch
from gaudi_batch.scheduling.pending import Pending
from gaudi_batch.scheduling.verdicts import UnmadeBatches, _at_least

SMALL, LARGE = Bucket(64, 64, 20, 7.5), Bucket(128, 64, 20, 7.5)
KEY, OTHER = SMALL.graph_key, LARGE.graph_key


def test_what_a_plan_comes_to_is_the_sum_of_its_shards() -> None:
    plan = [
        Shard(0, 0, 0, 4, SMALL, rows=4, images=8),
        Shard(1, 0, 0, 9, LARGE, rows=5, images=5),
        Shard(2, 0, 4, 9, SMALL, rows=3, images=3),
        Shard(3, 0, 9, 12, LARGE, rows=3, images=9),
    ]
    summaries = summarize(plan, batch_size=4)
    assert list(summaries) == [SMALL, LARGE]
    assert summaries[SMALL] == PlanSummary(shards=2, rows=7, images=11, batches=3, padding=1)
    assert summaries[LARGE] == PlanSummary(shards=2, rows=8, images=14, batches=5, padding=6)
    assert summaries[LARGE].padding_share == 0.3


def test_guidance_doubles_the_work_only_above_one() -> None:
    for scale, guided in ((0.0, False), (0.5, False), (1.0, False), (1.1, True)):
        bucket = Bucket(64, 64, 20, scale)
        assert bucket.batch_kind == BatchKind(64, 64, 20, guided)
        assert bucket.graph_key == GraphKey(64, 64, guided)


def test_the_last_tenth_of_a_plan_is_in_shards_of_a_quarter() -> None:
    sizes = [shard.rows for shard in plan_shards([RowSpan(0, 0, 1000, SMALL, 1)], 1000, ShardSizes(2, rows=50))]
    assert sizes == [50] * 18 + [12] * 8 + [4]
    sizes = [shard.rows for shard in plan_shards([RowSpan(0, 0, 100, SMALL, 1)], 100, ShardSizes(1, rows=10))]
    assert sizes == [10] * 9 + [2] * 5, "a quarter of ten is two"
    sizes = [shard.rows for shard in plan_shards([RowSpan(0, 0, 110, SMALL, 1)], 110, ShardSizes(1, rows=11))]
    assert sizes == [11] * 9 + [2] * 5 + [1], "and of eleven, too"


def test_what_a_capture_costs_is_the_time_beyond_that_of_the_images() -> None:
    affinity = Affinity(4)
    affinity.use(0, KEY)
    affinity.took(KEY, 30.0, 10, captured=True)
    affinity.took(KEY, 10.0, 10, captured=False)
    # One second an image, so the capture took 20 s: as long as two shards of 10 images.
    assert affinity.is_worth_it(KEY, pending=30, images=10)
    assert not affinity.is_worth_it(KEY, pending=20, images=10)
    assert affinity.is_worth_it(OTHER, pending=10, images=10), "nobody has captured it"


def test_a_card_goes_on_with_the_key_of_which_most_images_wait_for_each_holder() -> None:
    affinity = Affinity(4)
    assert affinity.choose(0, {KEY: (5, 1), OTHER: (4, 9)}) == KEY
    affinity.use(1, KEY)
    assert affinity.choose(0, {KEY: (5, 1), OTHER: (4, 9)}) == OTHER
    assert affinity.choose(0, {KEY: (9, 1), OTHER: (4, 9)}) == KEY


def test_what_waits_is_counted_wherever_it_waits() -> None:
    pending = Pending({shard.number: shard for shard in shards(7)})
    assert (len(pending), pending.plain) == (7, 7)
    key = next(iter(pending.fresh))
    images = pending.images(key)
    taken = [pending.take_fresh(key, 0) for _ in range(4)]
    assert len(pending) == 3
    pending.put_suspect(taken[0])
    pending.put_suspect(taken[1], alone_on_node=True)
    pending.park(taken[2])
    pending.put_returned(taken[3])
    assert (len(pending), pending.plain) == (7, 4)
    assert pending.images(key) == images
    assert all(pending.take(shard) for shard in taken)
    assert not pending.take(taken[0])
    assert (len(pending), pending.plain) == (3, 3)
    assert pending.images(key) == sum(shard.images for shard in shards(7)[4:])


def ready(*nodes: str) -> tuple[Cards, list[Card]]:
    cards = Cards(Affinity(4))
    made = []
    for number, node in enumerate(nodes):
        card = Card(number, node)
        card.state, card.has_made = CardState.READY, True
        cards.add(card)
        cards.file(card)
        made.append(card)
    return cards, made


@pytest.mark.parametrize(
    ("nodes", "cut", "aside"),
    [
        (("a", "b", "c"), (0,), False),
        (("a", "b", "c"), (0, 1), True),
        (("a", "a", "b"), (0, 1), False),
        (("a", "a", "a"), (0, 1), True),
        (("a",), (0,), False),
        (("a",), (0, 0), True),
    ],
)
def test_a_kind_of_batch_is_set_aside_when_cards_of_two_nodes_were_killed_at_it(
    nodes: tuple[str, ...], cut: tuple[int, ...], aside: bool
) -> None:
    """Where all cards are on one node, two cards; where there is one, twice."""
    live_cards, cards = ready(*nodes)
    unmade = UnmadeBatches()
    set_aside = [
        unmade.slow(cards[number], SlowBatch(SMALL.batch_kind, "600 s (limits.first_batch)"), live_cards)
        for number in cut
    ]
    assert set_aside == [False] * (len(cut) - 1) + [aside]


@pytest.mark.parametrize(("count", "expected"), [(0, 2.0), (2, 2.0), (3, 2.0), (8, 2.0), (1, 0.1), (40, 10.0)])
def test_the_chance_of_so_many_failures_is_that_of_poisson(count: int, expected: float) -> None:
    below = sum(math.exp(-expected) * expected**k / math.factorial(k) for k in range(count))
    chance: Any = _at_least(count, expected)
    assert chance == (1.0 if count <= expected else pytest.approx(1 - below, abs=1e-12))


@pytest.mark.parametrize(
    ("kept", "nodes", "other_work", "may"),
    [
        (0, 1, 5, True),
        (1, 1, 5, False),
        (1, 1, 0, True),
        (1, 4, 5, False),
        (1, 7, 5, False),
        (1, 8, 5, True),
        (2, 8, 5, False),
    ],
)
def test_one_node_in_four_is_kept_for_suspect_shards_while_other_work_waits(
    kept: int, nodes: int, other_work: int, may: bool
) -> None:
    work: Any = Dispatch.__new__(Dispatch)
    work.cards = SimpleNamespace(exclusive=dict.fromkeys(range(kept)), live_on=dict.fromkeys(range(nodes), 1))
    work.pending = SimpleNamespace(plain=other_work)
    assert NODES_PER_EXCLUSIVE == 4
    assert work._may_keep_node() is may
