"""Whatever the order of events, the schedule loses no shard, commits none twice, and ends.

The machine below plays the driver and the cards: it carries out what the schedule decides and lets anything happen at
any time, late news of the dead among it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_batch.decisions import Assign, Commit, Decision, Finish, Quarantine, Recall, Release, Replace
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.schedule import MAX_START_FAILURES, MAX_VINDICATIONS, QUEUE, CardState, Schedule

BUCKETS = [Bucket(64, 64, 20, 7.5), Bucket(64, 64, 20, 1.0), Bucket(128, 64, 20, 7.5)]


def shards(count: int, rows: int = 4, buckets: int = 1) -> list[Shard]:
    return [
        Shard(number, 0, number * rows, (number + 1) * rows, BUCKETS[number % buckets], rows, rows)
        for number in range(count)
    ]


@dataclass
class World:
    """Cards that obey, and a record of all that the schedule must not do."""

    schedule: Schedule
    rows: int = 4
    hands: dict[int, list[Assign]] = field(default_factory=dict)
    starting: set[int] = field(default_factory=set)
    quarantined: set[int] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)
    recalls: list[Recall] = field(default_factory=list)
    commits: list[tuple[int, str]] = field(default_factory=list)
    old: list[Assign] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)
    assigned_to: dict[int, list[int]] = field(default_factory=dict)
    finished: list[str | None] = field(default_factory=list)
    captured: set[tuple[int, object]] = field(default_factory=set)

    def do(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            assert not self.finished, f"{decision} after the end"
            if isinstance(decision, Assign):
                number = decision.shard.number
                assert number not in self.committed
                assert number not in [shard for shard, _ in self.commits]
                assert all(a.shard.number != number for hand in self.hands.values() for a in hand), "in two hands"
                assert decision.card not in self.leaving
                self.hands[decision.card].append(decision)
                assert len(self.hands[decision.card]) <= QUEUE
                self.assigned_to.setdefault(number, []).append(decision.card)
            elif isinstance(decision, Recall):
                self.recalls.append(decision)
            elif isinstance(decision, Commit):
                assert decision.shard not in self.committed
                self.commits.append((decision.shard, decision.attempt))
            elif isinstance(decision, Replace):
                self.old += self.hands.pop(decision.card, [])
                self.starting.add(decision.card)
            elif isinstance(decision, Quarantine):
                self.old += self.hands.pop(decision.card, [])
                self.quarantined.add(decision.card)
            elif isinstance(decision, Release):
                assert decision.card in self.leaving
                assert not self.hands.pop(decision.card, [])
                self.starting.discard(decision.card)
            elif isinstance(decision, Finish):
                self.finished.append(decision.reason)

    def join(self, card: int, node: str = "") -> None:
        self.do(self.schedule.starting(card, node))
        self.starting.add(card)

    def ready(self, card: int) -> None:
        self.starting.discard(card)
        self.hands[card] = []
        self.do(self.schedule.ready(card))

    def die(self, card: int, error: str = "killed") -> None:
        self.starting.discard(card)
        self.old += self.hands.pop(card, [])
        self.do(self.schedule.died(card, error))

    def break_down(self, card: int, error: str = "out of device memory") -> None:
        self.starting.discard(card)
        self.old += self.hands.pop(card, [])
        self.do(self.schedule.broken(card, error))

    def refuse(self, card: int) -> None:
        self.starting.discard(card)
        self.do(self.schedule.refused(card, "another torch"))

    def leave(self, card: int) -> None:
        self.starting.discard(card)
        self.old += self.hands.pop(card, [])
        self.do(self.schedule.gone(card))

    def take_leave(self, card: int) -> None:
        self.leaving.add(card)
        self.do(self.schedule.leaving(card))

    def finish_first(self, card: int, failed: int = 0) -> None:
        assignment = self.hands[card].pop(0)
        graph = (card, assignment.shard.bucket.graph_key)
        seconds = 1.0 if graph in self.captured else 50.0
        self.captured.add(graph)
        self.do(self.schedule.done(assignment.attempt, self.rows, failed, failed, seconds))

    def fail_first(self, card: int, accused: bool, healthy: bool) -> None:
        assignment = self.hands[card].pop(0)
        rows = {assignment.shard.start: "boom"} if accused else {}
        self.do(self.schedule.failed(assignment.attempt, "boom", rows, healthy))

    def commit_first(self) -> None:
        shard, _ = self.commits.pop(0)
        self.committed.add(shard)
        self.do(self.schedule.committed(shard))

    def answer_recall(self, give_back: bool) -> None:
        recall = self.recalls.pop(0)
        hand = self.hands.get(recall.card, [])
        mine = [assignment for assignment in hand if assignment.attempt == recall.attempt]
        # A card that is working on a shard already keeps it.
        given = bool(mine) and give_back and mine[0] is not hand[0]
        if given:
            hand.remove(mine[0])
        if mine:
            self.do(self.schedule.recalled(recall.attempt, given))


def let_it_end(world: World, new_card: int) -> None:
    """From here on nothing goes wrong; the run has to end within a bounded number of events."""
    if not world.finished and not world.hands.keys() - world.leaving and not world.starting:
        world.join(new_card)
    world.do(world.schedule.expect(False))
    for _ in range(10_000):
        if world.finished:
            return
        if world.commits:
            world.commit_first()
        elif world.recalls:
            world.answer_recall(True)
        elif world.starting:
            world.ready(next(iter(world.starting)))
        else:
            busy = [card for card, hand in world.hands.items() if hand]
            assert busy, "nothing happens any more and the run has not ended"
            world.finish_first(busy[0])
    raise AssertionError("the run does not end")


def something_joins(world: World, card: int) -> bool:
    world.join(card)
    return True


def anything_happens(world: World, rng: random.Random) -> None:
    """One event of those that can happen now, likely ones more often."""
    busy = [card for card, hand in world.hands.items() if hand]
    alive = sorted(world.hands) + sorted(world.starting)
    possible = (
        (["ready"] * 4 + ["refuse"]) * bool(world.starting)
        + ["finish"] * 6 * bool(busy)
        + ["fail", "announce"] * bool(busy)
        + ["commit"] * 6 * bool(world.commits)
        + ["recall"] * 4 * bool(world.recalls)
        + ["die"] * bool(alive)
        + ["leave"] * (len(alive) > 1)
        + ["take leave"] * (len(alive) > 1)
        + ["late"] * 2 * bool(world.old)
        + ["hope", "lose hope"]
    )
    event = rng.choice(possible)
    if event == "ready":
        world.ready(rng.choice(sorted(world.starting)))
    elif event == "refuse":
        world.refuse(rng.choice(sorted(world.starting)))
    elif event == "finish":
        world.finish_first(rng.choice(busy), rng.choice([0, 0, 1]))
    elif event == "fail":
        world.fail_first(rng.choice(busy), rng.random() < 0.5, rng.random() < 0.5)
    elif event == "announce":
        first = world.hands[rng.choice(busy)][0]
        rows = range(first.shard.start, first.shard.start + rng.randint(1, 4))
        world.do(world.schedule.announced(first.attempt, rows))
    elif event == "commit":
        world.commit_first()
    elif event == "recall":
        world.answer_recall(rng.random() < 0.5)
    elif event == "die":
        rng.choice([world.die, world.break_down])(rng.choice(alive))
    elif event == "leave":
        world.leave(rng.choice(alive))
    elif event == "take leave":
        world.take_leave(rng.choice(alive))
    elif event in ("hope", "lose hope"):
        world.do(world.schedule.expect(event == "hope"))
    elif event == "late":
        attempt = rng.choice(world.old).attempt
        late = [
            world.schedule.done(attempt, 4, 0, 0),
            world.schedule.failed(attempt, "late", {}, True),
            world.schedule.announced(attempt, [1]),
            world.schedule.recalled(attempt, True),
        ]
        assert late == [[], [], [], []]


@given(st.data())
@settings(max_examples=1000)
def test_no_order_of_events_loses_or_repeats_a_shard(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12), "shards")
    work = shards(count, buckets=data.draw(st.integers(1, 3), "graph keys"))
    world = World(Schedule(work, "a", 4 * count, max_graphs=data.draw(st.integers(1, 3), "graphs of a card")))
    cards = data.draw(st.integers(1, 5), "cards")
    for card in range(cards):
        world.join(card)
    rng = random.Random(data.draw(st.integers(0, 2**32), "order"))
    for _ in range(data.draw(st.integers(0, 120), "events")):
        if world.finished:
            break
        cards += rng.random() < 0.05 and something_joins(world, cards)
        anything_happens(world, rng)
    let_it_end(world, cards + 1)
    (reason,) = world.finished
    if reason is None:
        assert world.committed == set(range(count))
    else:
        assert world.schedule.stuck or "no card is left" in reason


def start(world: World, cards: int) -> None:
    for card in range(cards):
        world.join(card)
    for card in range(cards):
        world.ready(card)


def test_a_card_has_the_next_shard_while_it_works_on_one() -> None:
    world = World(Schedule(shards(10), "a", 40))
    start(world, 2)
    assert [len(hand) for hand in world.hands.values()] == [2, 2]


def test_near_the_end_nothing_queues_behind_a_busy_card() -> None:
    world = World(Schedule(shards(4), "a", 16))
    start(world, 2)
    world.finish_first(0)
    world.finish_first(0)
    assert [recall.card for recall in world.recalls] == [1]
    world.answer_recall(True)
    assert [len(world.hands[card]) for card in (0, 1)] == [1, 1]


def test_an_idle_card_does_not_ask_back_what_it_may_not_have() -> None:
    world = World(Schedule(shards(3), "a", 12))
    start(world, 2)
    world.fail_first(1, accused=False, healthy=True)
    world.answer_recall(True)
    assert [assignment.shard.number for assignment in world.hands[0]] == [0, 2]
    world.finish_first(1)
    assert not world.recalls, "card 1 has failed shard 2, which waits for card 0"


def test_a_failed_shard_goes_to_another_card() -> None:
    world = World(Schedule(shards(6), "a", 24))
    start(world, 3)
    shard = world.hands[1][0].shard.number
    world.fail_first(1, accused=False, healthy=True)
    for _ in range(20):
        busy = [card for card, hand in world.hands.items() if hand]
        if world.finished or not busy:
            break
        world.finish_first(busy[0])
    assert len(world.assigned_to[shard]) == 2
    assert world.assigned_to[shard][1] != 1


def test_a_shard_that_two_cards_failed_does_not_wait_for_one_that_starts() -> None:
    world = World(Schedule(shards(1), "a", 4))
    for card in range(3):
        world.join(card)
    world.ready(0)
    world.fail_first(0, accused=False, healthy=True)
    assert not world.hands[0], "cards 1 and 2 may make it"
    world.ready(1)
    world.fail_first(1, accused=False, healthy=True)
    assert world.assigned_to[0] == [0, 1, 0], "card 2 may take long"


def test_a_card_keeps_to_the_graph_keys_that_it_has_captured() -> None:
    work = shards(60, buckets=3)
    world = World(Schedule(work, "a", 240))
    start(world, 3)
    captured: dict[int, set[object]] = {card: set() for card in range(3)}
    while not world.finished:
        for card, hand in list(world.hands.items()):
            if hand:
                captured[card].add(hand[0].shard.bucket.graph_key)
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
    world = World(Schedule(work, "a", 128), rows=16)
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
        card = next(card for card, hand in world.hands.items() if hand)
        first = world.hands[card][0]
        rows = range(first.shard.start, first.shard.stop)
        deadly = killers.intersection(rows) - set(first.condemned)
        if not deadly:
            world.finish_first(card, failed=len(first.condemned))
            continue
        rest = [row for row in rows if row not in first.alone]
        batches = [rest[i : i + 4] for i in range(0, len(rest), 4)]
        batches += [[row] for row in rows if row in first.alone]
        for batch in batches:
            if first.announce:
                world.do(world.schedule.announced(first.attempt, batch))
            if deadly.intersection(batch):
                deaths += 1
                world.die(card)
                break
    assert world.finished == [None]
    assert deaths <= 3 * len(killers)
    assert not world.quarantined
    assert world.schedule.failed_rows == len(killers)


def test_a_card_that_always_fails_is_quarantined_and_costs_no_row() -> None:
    work = shards(40)
    world = World(Schedule(work, "a", 160))
    start(world, 3)
    failures = 0
    while not world.finished:
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(True)
        for card in sorted(world.starting):
            world.ready(card)
        for card, hand in list(world.hands.items()):
            if hand and card in world.hands:
                if card == 1:
                    failures += 1
                    world.fail_first(1, accused=True, healthy=False)
                else:
                    world.finish_first(card)
    assert world.finished == [None]
    assert world.quarantined == {1}
    assert world.schedule.failed_rows == 0
    assert failures <= MAX_VINDICATIONS + QUEUE


def test_cards_that_never_start_end_the_run_with_their_error() -> None:
    world = World(Schedule(shards(4), "a", 16))
    for card in range(3):
        world.join(card)
    while world.starting:
        world.die(next(iter(world.starting)), "no memory")
    assert not world.finished, "others may take their place until the cluster has been looked at since"
    world.do(world.schedule.expect(False))
    (reason,) = world.finished
    assert reason is not None
    assert "no memory" in reason


def test_a_card_that_is_refused_is_not_started_again_and_costs_no_row() -> None:
    world = World(Schedule(shards(4), "a", 16))
    for card in range(2):
        world.join(card)
    world.ready(0)
    world.refuse(1)
    assert (world.quarantined, world.starting) == ({1}, set())
    let_it_end(world, 2)
    assert world.finished == [None]
    assert world.schedule.failed_rows == 0


def test_a_run_whose_every_card_is_refused_ends_with_the_reason() -> None:
    world = World(Schedule(shards(4), "a", 16))
    world.join(0)
    world.refuse(0)
    world.do(world.schedule.expect(False))
    assert world.finished == ["no card is left; the last error of one: another torch"]


def test_cards_whose_device_fails_before_they_made_anything_end_the_run_and_cost_no_row() -> None:
    world = World(Schedule(shards(4), "a", 16))
    start(world, 3)
    broken = 0
    while world.starting or world.hands:
        for card in sorted(world.starting):
            world.ready(card)
        card = next(card for card, hand in world.hands.items() if hand)
        if world.hands[card][0].announce:
            world.do(world.schedule.announced(world.hands[card][0].attempt, ()))  # its control, which it does not make
        world.break_down(card)
        broken += 1
    world.do(world.schedule.expect(False))
    assert broken == 3 * MAX_START_FAILURES
    assert world.schedule.failed_rows == 0
    (reason,) = world.finished
    assert reason is not None
    assert "out of device memory" in reason


def test_a_card_that_leaves_finishes_what_it_has_begun_and_gets_nothing_more() -> None:
    world = World(Schedule(shards(6), "a", 24))
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
    schedule = Schedule(shards(6), "a", 24)
    for card in range(2):
        schedule.starting(card)
        schedule.ready(card)
    schedule.leaving(0)
    assert Release(0) in schedule.died(0, "its node went down")
    assert schedule.state(0) is CardState.GONE


def test_a_run_without_cards_waits_while_the_cluster_may_give_some() -> None:
    world = World(Schedule(shards(2), "a", 8))
    world.do(world.schedule.expect(True))
    start(world, 1)
    world.leave(0)
    assert not world.finished
    world.join(1)
    world.ready(1)
    world.do(world.schedule.expect(False))
    world.leave(1)
    assert not world.finished, "a card that left is waited for until the cluster has been looked at since"
    world.do(world.schedule.expect(False))
    assert world.finished == ["no card is left; the last error of one: none"]


def test_a_run_whose_every_card_failed_on_two_nodes_hopes_for_none() -> None:
    world = World(Schedule(shards(2), "a", 8))
    world.do(world.schedule.expect(True))
    for card, node in enumerate(["first", "first", "second"]):
        world.join(card, node)
        for _ in range(MAX_START_FAILURES):
            assert not world.finished
            world.die(card, "no such model")
    assert world.finished == ["no card is left; the last error of one: no such model"]


def test_a_quarantined_card_whose_node_goes_is_gone() -> None:
    world = World(Schedule(shards(2), "a", 8))
    world.do(world.schedule.expect(True))
    world.join(0, "first")
    for _ in range(MAX_START_FAILURES):
        world.die(0, "no such module")
    assert world.schedule.state(0) is CardState.QUARANTINED
    world.leave(0)
    assert world.schedule.state(0) is CardState.GONE
    let_it_end(world, 1)
    assert world.finished == [None]


def test_the_loss_of_a_node_counts_against_nobody() -> None:
    world = World(Schedule(shards(10), "a", 40))
    start(world, 3)
    world.leave(2)
    assert world.schedule.retries == 0
    assert world.schedule.state(2) is CardState.GONE
    let_it_end(world, 9)
    assert world.finished == [None]


@pytest.mark.parametrize(("limit", "stops"), [(3, True), (4, False), (0.09, True), (0.11, False), (None, False)])
def test_max_failed_is_a_count_or_a_share(limit: float | None, stops: bool) -> None:
    world = World(Schedule(shards(10), "a", 40, max_failed=limit))
    start(world, 1)
    while not world.finished:
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(True)
        if world.hands[0]:
            number = world.hands[0][0].shard.number
            world.finish_first(0, failed=1 if number < 4 else 0)
    assert (world.finished[0] is not None) is stops


def test_a_run_whose_first_200_rows_all_failed_stops() -> None:
    world = World(Schedule(shards(100), "a", 400))
    start(world, 2)
    while not world.finished:
        while world.commits:
            world.commit_first()
        while world.recalls:
            world.answer_recall(True)
        for card, hand in list(world.hands.items()):
            if hand:
                world.finish_first(card, failed=4)
    assert "all failed" in str(world.finished[0])
    assert world.schedule.done_rows < 220


def test_stop_finishes_what_has_begun_and_takes_back_the_rest() -> None:
    world = World(Schedule(shards(10), "a", 40))
    start(world, 2)
    world.do(world.schedule.stop("enough"))
    while world.recalls:
        world.answer_recall(True)
    for card in (0, 1):
        world.finish_first(card)
    assert not world.finished
    while world.commits:
        world.commit_first()
    assert world.finished == ["enough"]
    assert len(world.committed) == 2


def test_ten_thousand_cards_are_scheduled_in_seconds() -> None:
    count, cards = 60_000, 10_000
    world = World(Schedule(shards(count), "a", 4 * count))
    start_of = {}
    schedule = world.schedule
    for card in range(cards):
        schedule.starting(card)
    waiting: list[Assign] = []
    for card in range(cards):
        waiting += [d for d in schedule.ready(card) if isinstance(d, Assign)]
    done = 0
    rng = random.Random(0)
    while waiting:
        place = rng.randrange(len(waiting))
        waiting[place], waiting[-1] = waiting[-1], waiting[place]
        assignment = waiting.pop()
        start_of[assignment.shard.number] = assignment
        decisions = schedule.done(assignment.attempt, 4, 0, 0)
        decisions += schedule.committed(assignment.shard.number)
        done += 1
        waiting += [d for d in decisions if isinstance(d, Assign)]
    assert done == count
    assert schedule.finished
