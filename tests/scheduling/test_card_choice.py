"""A shard that comes back goes to a card that has captured its graph, unless a capture is worth it."""

from __future__ import annotations

import pytest
from world import World, shards, start

from benchmarks.schedule import Simulation
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.affinity import Affinity
from gaudi_batch.scheduling.card_choice import CardChoice
from gaudi_batch.scheduling.cards import Card, Cards, CardState
from gaudi_batch.scheduling.decisions import Assign
from gaudi_batch.scheduling.dispatch import Dispatch
from gaudi_batch.scheduling.failures import ShardFailures
from gaudi_batch.scheduling.pending import Pending
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts


def world(count: int, cards: int) -> World:
    """Cards that have all made two shards. A capture takes as long as 49 shards."""
    world = World(Schedule(shards(count), "a", RowCounts(4 * count)))
    start(world, cards)
    for card in [*range(cards)] * 2:
        make(world, card)
    return world


def make(world: World, card: int) -> None:
    """A card makes its first shard, which is committed."""
    world.finish_first(card)
    while world.commits:
        world.commit_first()
    while world.recalls:
        world.answer_recall(True)


def has(world: World, card: int) -> list[int]:
    return [task.shard.number for task in world.in_flight[card]]


def test_a_shard_whose_card_died_waits_for_one_that_has_captured_its_graph() -> None:
    played = world(12, 3)
    for card in range(3):
        played.begin(card)
    lost = has(played, 0)
    played.die(0)
    played.ready(0)
    assert has(played, 0) == [], "it would have to capture the graph, and the others make a few shards meanwhile"
    while not played.finished:
        make(played, next(card for card in (1, 2) if has(played, card)))
    assert set(lost) <= played.committed
    assert all(card != 0 for shard in lost for card in played.assigned_to[shard][1:])


def test_a_card_that_has_to_capture_the_graph_gets_the_shard_while_much_else_is_left() -> None:
    played = world(300, 3)
    for card in range(3):
        played.begin(card)
    played.die(0)
    played.ready(0)
    (task,) = played.in_flight[0]
    assert task.announce, "it captures the graph anyway"


def test_a_card_that_has_to_capture_the_graph_gets_what_the_only_other_has_failed() -> None:
    played = world(9, 2)
    played.begin(0)
    played.die(0)
    played.ready(0)
    while 0 in played.assigned_to[has(played, 1)[0]]:
        make(played, 1)
    failed, *_ = has(played, 1)
    assert has(played, 0) == []
    played.fail_first(1, failed_alone_once=False, healthy=True)
    assert has(played, 0)[:1] == [failed]


def test_a_shard_that_a_node_has_died_of_rather_goes_to_a_card_of_another_that_has_to_capture_the_graph() -> None:
    played = World(Schedule(shards(14), "a", RowCounts(56)))
    start(played, 4, per_node=2)
    for card in [*range(4)] * 2:
        make(played, card)
    played.begin(0)
    played.die(3)
    played.ready(3)
    assert has(played, 3) == []
    (deadly, *_) = has(played, 0)
    played.die(0)
    played.die(2)
    played.ready(2)
    while has(played, 1):
        make(played, 1)
    assert [played.nodes[card] for card in played.assigned_to[deadly]][-1] == "node 1"


def chosen(work_on: int, died_on: list[int], dropping: str | None = None) -> int:
    """The card that a suspect shard gets: card 0 has captured the graph and works, card 1 idles, all on one node."""
    affinity, work = Affinity(4), {shard.number: shard for shard in shards(1)}
    affinity.took(work[0].bucket.graph_key, 50.0, 4, captured=True)
    affinity.took(work[0].bucket.graph_key, 1.0, 4, captured=False)
    affinity.use(0, work[0].bucket.graph_key)
    cards = Cards(affinity)
    for number in range(3):
        card = Card(number, "node", CardState.READY)
        card.in_flight = {f"a{attempt}": None for attempt in range(work_on * (number == 0))}
        card.dropping = dropping if number == 0 else None
        cards.add(card)
        if number < 2:
            cards.file(card)
    failures = {0: ShardFailures(failed_on=died_on, died_on=died_on)}
    return next(CardChoice(cards, affinity, Pending({}), failures, work).for_suspect(0)).number


@pytest.mark.parametrize("died_on", [[], [2]])
def test_a_suspect_shard_waits_for_a_card_that_works_where_only_that_has_captured_its_graph(died_on: list[int]) -> None:
    assert chosen(1, died_on) == 0
    assert chosen(2, died_on) == 0


def test_no_shard_waits_for_a_card_that_may_never_be_done_with_what_it_drops() -> None:
    assert chosen(0, [], dropping="a0") == 1


def test_a_card_that_has_work_captures_no_second_graph_for_a_shard_that_came_back() -> None:
    simulation = Simulation(200, 16, 0, prompts=1000)
    simulation.run()
    assert simulation.dead > 2
    assert simulation.captures <= 200 + simulation.dead


@pytest.mark.parametrize("keys", [1, 4])
def test_deaths_near_the_end_cost_no_capture(keys: int) -> None:
    """200 cards that would all be done at the same time."""
    simulation = Simulation(200, keys, 0, prompts=1000)
    assert simulation.run() <= 1.02 * simulation.ideal
    assert simulation.dead > 2


FEW, MANY = 2, 16


def returned(counts: dict[Bucket, int], capture: float) -> tuple[Dispatch, list[Assign]]:
    """Shards of several buckets that come back while card 0 has captured the first bucket's graph and has two shards in
    flight, and card 1, which idles, the last one's. A shard takes a second, and a capture so many."""
    buckets = [bucket for bucket, count in counts.items() for _ in range(count)]
    first, last = buckets[0], buckets[-1]
    numbered = {n: Shard(n, 0, 4 * n, 4 * n + 4, bucket, 4, 4) for n, bucket in enumerate([first, first, *buckets])}
    dispatch = Dispatch(numbered, "a", 1)
    dispatch.affinity.took(first.graph_key, 1.0 + capture, 4, captured=True)
    dispatch.affinity.took(first.graph_key, 1.0, 4, captured=False)
    for number, bucket in enumerate((first, last)):
        card = Card(number, f"node {number}", CardState.READY)
        dispatch.cards.add(card)
        if number == 0 or bucket != first:
            dispatch.affinity.use(number, bucket.graph_key)
        dispatch.cards.file(card)
    for key in list(dispatch.pending.fresh):
        while key in dispatch.pending.fresh:
            shard = dispatch.pending.take_fresh(key, 0)
            if shard < 2:
                dispatch.send(dispatch.cards.by_number[0], shard)
            else:
                dispatch.pending.put_returned(shard)
    return dispatch, [decision for decision in dispatch.next() if isinstance(decision, Assign)]


def test_a_card_captures_the_graph_for_many_shards_that_came_back_and_not_for_few() -> None:
    """As when most cards of a run die at its end: those that start again have a part in what these had."""
    one = Bucket(64, 64, 20, 7.5)
    assert returned({one: FEW}, capture=3.0)[1] == []
    _, assigned = returned({one: MANY}, capture=3.0)
    assert {decision.card for decision in assigned} == {1}


@pytest.mark.parametrize("count", [FEW, 200])
def test_shards_for_which_no_card_is_free_hold_up_none_of_another_graph(count: int) -> None:
    one, other = Bucket(64, 64, 20, 7.5), Bucket(96, 64, 20, 7.5)
    dispatch, assigned = returned({one: count, other: 4}, capture=1000.0)
    assert [decision.card for decision in assigned] == [1, 1]
    assert {decision.task.shard.bucket for decision in assigned} == {other}
    assert dispatch.pending.plain == count + 2
