"""Cards keep to the graphs that they have captured: the schedule with cards whose batches and captures take time."""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

import pytest
from world import loaded

from gaudi_batch.plan import Bucket, GraphKey, RowSpan, Shard
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.scheduling.affinity import Affinity
from gaudi_batch.scheduling.decisions import Assign, Commit, Decision, Finish, Recall, ShardTask
from gaudi_batch.scheduling.events import CardPlaced, RecallAnswered, ShardCommitted, ShardMade, ShardOutcome
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules

SHAPES = [(64, 64), (96, 64), (64, 96), (96, 96), (128, 64), (64, 128)]
BATCH = 8
BATCH_S = 0.9


class InPlanOrder(Schedule):
    """A schedule without affinity: each card takes the next shard of the plan."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._work._choose_key = self._next_of_the_plan  # type: ignore[method-assign]

    def _next_of_the_plan(self, card: object) -> GraphKey | None:
        fresh = self._work.pending.fresh
        return min(fresh, key=lambda key: next(iter(fresh[key])), default=None)


def shuffled_plan(rows: int, shard_size: int, shapes: int = 6) -> list[Shard]:
    """Rows that ask for one of several shapes, in random order."""
    buckets = [Bucket(*SHAPES[row % shapes], 20, 2.0) for row in range(rows)]
    random.Random(0).shuffle(buckets)
    runs = (RowSpan(0, row, 1, bucket, 1) for row, bucket in enumerate(buckets))
    return list(plan_shards(runs, rows, ShardSizes(BATCH, rows=shard_size)))


def simulate(
    schedule: Schedule, cards: int, capture_seconds: float, given: dict[int, list[ShardTask]] | None = None
) -> tuple[int, float]:
    """Plays cards that take their time; returns the graphs captured and the seconds of the run. `given` gets what each
    card makes, in order."""
    rng = random.Random(0)
    number = itertools.count()
    events: list[tuple[float, int, tuple[Any, ...]]] = []
    in_flight: dict[int, list[ShardTask]] = {card: [] for card in range(cards)}
    graphs: dict[int, set[GraphKey]] = {card: set() for card in range(cards)}
    working: set[int] = set()
    now, captures, end = 0.0, 0, 0.0

    def later(seconds: float, *event: Any) -> None:
        heapq.heappush(events, (now + seconds, next(number), event))

    def work(card: int) -> None:
        nonlocal captures
        if card in working or not in_flight[card]:
            return
        working.add(card)
        task = in_flight[card][0]
        if given is not None:
            given.setdefault(card, []).append(task)
        seconds = -(-task.shard.images // BATCH) * BATCH_S * rng.uniform(1, 1.3)
        if task.shard.bucket.graph_key not in graphs[card]:
            graphs[card].add(task.shard.bucket.graph_key)
            captures += 1
            seconds += capture_seconds
        later(seconds, "done", card, task, seconds)

    def do(decisions: list[Decision]) -> None:
        nonlocal end
        for decision in decisions:
            if isinstance(decision, Assign):
                in_flight[decision.card].append(decision.task)
                work(decision.card)
            elif isinstance(decision, Recall):
                queued = [each for each in in_flight[decision.card][1:] if each.attempt == decision.attempt]
                for each in queued:
                    in_flight[decision.card].remove(each)
                later(0.01, "recalled", decision.attempt, bool(queued))
            elif isinstance(decision, Commit):
                later(0.05, "committed", decision.shard)
            elif isinstance(decision, Finish):
                assert decision.reason is None
                end = now

    for card in range(cards):
        do(schedule.handle(CardPlaced(card)))
        later(0.3 * card, "ready", card)
    while events:
        now, _, (kind, *info) = heapq.heappop(events)
        if kind == "ready":
            do(schedule.handle(loaded(info[0])))
        elif kind == "recalled":
            do(schedule.handle(RecallAnswered(*info)))
        elif kind == "committed":
            do(schedule.handle(ShardCommitted(info[0])))
        else:
            card, task, seconds = info
            in_flight[card].remove(task)
            working.discard(card)
            work(card)
            do(schedule.handle(ShardMade(task.attempt, ShardOutcome(task.shard.rows, 0, 0, seconds=seconds))))
    assert end
    return captures, end


@pytest.mark.parametrize("capture_seconds", [5.0, 60.0])
@pytest.mark.parametrize(("rows", "shard_size"), [(1632, 32), (480, 16), (10_000, 256)])
def test_six_shapes_on_four_cards_are_captured_nine_times_at_most(
    rows: int, shard_size: int, capture_seconds: float
) -> None:
    plan = shuffled_plan(rows, shard_size)
    captures, seconds = simulate(Schedule(plan, "a", RowCounts(rows)), 4, capture_seconds)
    others, longer = simulate(InPlanOrder(plan, "a", RowCounts(rows)), 4, capture_seconds)
    assert captures <= 9
    assert others > 1.7 * captures
    assert seconds < longer


def test_every_card_helps_with_one_shape_while_that_is_worth_a_capture() -> None:
    plan = shuffled_plan(1600, 16, shapes=1)
    captures, seconds = simulate(Schedule(plan, "a", RowCounts(1600)), 8, 5.0)
    assert captures == 8
    assert seconds < 1600 / BATCH * BATCH_S * 1.3 / 8 + 15
    # The same with a capture that takes as long as forty shards: the second half of the cards would come too late.
    assert simulate(Schedule(plan, "a", RowCounts(1600)), 8, 100.0)[1] < 1600 / BATCH * BATCH_S * 1.3 / 8 + 130


def test_free_captures_leave_no_card_idle() -> None:
    plan = shuffled_plan(480, 16)
    assert simulate(Schedule(plan, "a", RowCounts(480)), 8, 0.0)[1] < 480 / BATCH * BATCH_S * 1.3 / 8 + 6


def test_a_card_that_keeps_one_graph_counts_on_no_other() -> None:
    first, second = (bucket.graph_key for bucket in (Bucket(64, 64, 20, 2.0), Bucket(96, 64, 20, 2.0)))
    affinity = Affinity(max_graphs=1)
    assert affinity.use(0, first)
    assert affinity.use(0, second)
    assert affinity.captured(0) == [second]
    assert affinity.use(0, first)
    plan = shuffled_plan(480, 16, shapes=2)
    assert simulate(Schedule(plan, "a", RowCounts(480), Rules(max_graphs=1)), 1, 5.0)[0] == 2


LATE, EARLY = GraphKey(64, 64, True), GraphKey(96, 64, True)


@pytest.mark.parametrize(
    ("cards_early", "left_early", "late_batch_s", "capture_s", "goes"),
    [
        pytest.param(4, 380, 1.0, 60.0, True, id="132 s in place of 150"),
        pytest.param(4, 380, 1.0, 140.0, False, id="a capture takes too long"),
        pytest.param(4, 100, 1.0, 60.0, False, id="four that are done soon and come by themselves need 117 s"),
        pytest.param(1, 95, 1.0, 60.0, False, id="nobody would be left"),
        pytest.param(4, 420, 1.0, 60.0, False, id="its own key would be late then"),
        pytest.param(4, 380, 0.5, 60.0, False, id="the late key's images take less time"),
        pytest.param(4, 380, 0.0, 60.0, False, id="how long they take is not known"),
    ],
)
def test_a_card_leaves_its_key_for_a_late_one_where_the_run_then_ends_sooner(
    cards_early: int, left_early: int, late_batch_s: float, capture_s: float, goes: bool
) -> None:
    """The late key has four cards with 150 batches each to make."""
    affinity = with_cards(late=4, early=cards_early)
    affinity.took(EARLY, 1.0, BATCH, captured=False)
    if late_batch_s:
        affinity.took(LATE, late_batch_s, BATCH, captured=False)
    affinity.took(EARLY, capture_s + 1.0, BATCH, captured=True)
    pending = {LATE: (600 * BATCH, BATCH), EARLY: (left_early * BATCH, BATCH)}
    assert {affinity.choose(4, pending) for _ in pending} == ({LATE, EARLY} if goes else {EARLY})
    assert {affinity.choose(0, pending) for _ in pending} == {LATE}


def test_cards_that_leave_for_a_late_key_are_no_more_than_are_of_use() -> None:
    affinity = with_cards(late=4, early=8)
    for key in (LATE, EARLY):
        affinity.took(key, 1.0, BATCH, captured=False)
    affinity.took(EARLY, 61.0, BATCH, captured=True)
    pending = {LATE: (600 * BATCH, BATCH), EARLY: (760 * BATCH, BATCH)}
    left = 0
    for card in [card for card in range(4, 12) for _ in pending]:
        chosen = affinity.choose(card, pending)
        assert chosen is not None
        left += affinity.use(card, chosen)
    assert left == 1, "132 s with the first that comes; a second one would save less than its capture costs"


def test_what_a_capture_takes_is_found_for_each_key_by_itself() -> None:
    """The images of one key take ten times as long as those of the other."""
    affinity = with_cards(late=1, early=1)
    for key, batch_s in ((LATE, 10.0), (EARLY, 1.0)):
        affinity.took(key, 64 * batch_s, 64 * BATCH, captured=False)
        affinity.took(key, 64 * batch_s + 60, 64 * BATCH, captured=True)
        assert affinity._capture_s == pytest.approx(60)


def with_cards(late: int, early: int) -> Affinity:
    affinity = Affinity(4)
    for card in range(late + early):
        affinity.use(card, LATE if card < late else EARLY)
    return affinity
