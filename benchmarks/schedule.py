"""What the plan and the schedule cost: simulated clusters of up to 10,000 cards, with slow cards, deaths, lost nodes
and a card that hangs at the end.

    python -m benchmarks.schedule            # all cases
    python -m benchmarks.schedule --cards 1000 --keys 16 --prompts 2560

Cards are played on a simulated clock. Measured are how long the run takes beside the ideal, and the time inside the
schedule for each event that it is told, which is CPU time.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.report import Benchmark, Row
from gaudi_batch.plan import Bucket, GraphKey, GroupRows, RowSpan, Shard
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.scheduling.decisions import (
    Assign,
    Commit,
    Decision,
    Drop,
    Finish,
    Quarantine,
    Recall,
    Replace,
    ShardTask,
)
from gaudi_batch.scheduling.events import (
    AttemptEnded,
    CardDied,
    CardGone,
    CardLoaded,
    CardPlaced,
    Event,
    LoadedCard,
    RecallAnswered,
    ShardBegun,
    ShardCommitted,
    ShardMade,
    ShardOutcome,
    TimePassed,
)
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules

BATCH = 8
BATCH_S = 0.885
"""As long as a batch of 8 of Stable Diffusion 2 takes a Gaudi 2 (optimum-habana's README)."""
ROWS_OF_SHAPE = 64
"""Rows that follow each other with one shape."""
SHARD_S = 30.0
"""Of shards that a case names a number of."""
CAPTURE_S = 60.0
START_S = 20.0
SLOW_SHARE, SLOW_FACTOR = 0.01, 3.0
DEATHS_PER_CARD_HOUR = 0.5
CARDS_OF_A_NODE = 8
COMMIT_S = 0.05
RECALL_S = 0.01
TICK_S = 0.2
HANG_LIMIT_S = 60.0
"""After which a card that hangs is killed, as by the product's default of `limits.batch`."""


@dataclass
class _Card:
    number: int
    slow: bool
    process: int = 0  # grows with each replacement, so that news of an old one is known
    in_flight: list[ShardTask] = field(default_factory=list)
    graphs: set[GraphKey] = field(default_factory=set)
    working: bool = False
    gone: bool = False
    hangs: bool = False
    group: int = -1  # the row group that it has decoded
    reads: int = 0

    @property
    def node(self) -> str:
        return f"node {self.number // CARDS_OF_A_NODE}"


class Simulation:
    """A run on simulated cards.

    Args:
        cards: how many.
        keys: graph keys, over which the shards are spread evenly, in random order.
        shards: how many for each card, all of one size.
        prompts: if not 0, how many for each card, planned as a job is that names no size, in place of shards.
        hang: whether a card hangs in the last shard that is assigned.
        row_groups: of the prompts.
        slow_share: of the cards, that take `SLOW_FACTOR` times as long.
        seed: of all that is drawn.
        deaths: whether processes die now and then.
        lost_nodes: nodes that are lost, and others come, when a fifth of the run's time is over and again when two are.
        watch: called around each call of the schedule, and returns what that returns.
    """

    def __init__(
        self,
        cards: int,
        keys: int,
        shards: int,
        seed: int = 0,
        deaths: bool = True,
        lost_nodes: int = 0,
        watch: Callable[[Callable[[], list[Decision]]], list[Decision]] = lambda call: call(),
        prompts: int = 0,
        hang: bool = False,
        row_groups: int = 32,
        slow_share: float = SLOW_SHARE,
    ) -> None:
        self.rng = random.Random(seed)
        self.row_groups = row_groups
        buckets = [Bucket(512 + 64 * key, 512, 50, 7.5) for key in range(keys)]
        self.image_s = BATCH_S / BATCH if prompts else SHARD_S / BATCH
        if prompts:
            plan = list(self._plan(buckets, cards, prompts))
        else:
            order = [buckets[number % keys] for number in range(cards * shards)]
            self.rng.shuffle(order)
            plan = [Shard(number, 0, 8 * number, 8 * number + 8, bucket, 8, 8) for number, bucket in enumerate(order)]
        self.images = sum(shard.images for shard in plan)
        self.hang = hang
        self.backups = 0
        self.schedule = Schedule(plan, "a", RowCounts(self.images), Rules(batch_size=BATCH))
        self.cards = [_Card(number, self.rng.random() < slow_share) for number in range(cards)]
        self.deaths = deaths
        self.lost_nodes = lost_nodes
        self.events = 0
        self.captures = 0
        self.dead = 0
        self.quarantined = 0
        self.reason: str | None = "it never ended"
        self._watch = watch
        self._now = 0.0
        self._tie = itertools.count()
        self._queue: list[tuple[float, int, Callable[..., list[Decision]], tuple[Any, ...]]] = []

    def _plan(self, buckets: list[Bucket], cards: int, prompts: int) -> Iterator[Shard]:
        rows = cards * prompts
        edges = [rows * group // self.row_groups for group in range(self.row_groups + 1)]
        groups = [GroupRows(0, group, *edge) for group, edge in enumerate(itertools.pairwise(edges))]
        spans = [
            RowSpan(0, start, min(start + ROWS_OF_SHAPE, group.stop) - start, self.rng.choice(buckets), 1, group.group)
            for group in groups
            for start in range(group.start, group.stop, ROWS_OF_SHAPE)
        ]
        return plan_shards(spans, rows, ShardSizes(BATCH, cards=cards, groups=groups))

    @property
    def reads(self) -> float:
        """How often a row group was decoded, on average."""
        return sum(card.reads for card in self.cards) / self.row_groups

    @property
    def ideal(self) -> float:
        """Seconds that the run would take if work could be cut at will, with the captures that it made and without
        deaths, once its cards are ready."""
        speed = sum(1 / SLOW_FACTOR if card.slow else 1.0 for card in self.cards)
        return START_S + (self.images * self.image_s + self.captures * CAPTURE_S) / speed

    @property
    def best(self) -> float:
        """Seconds of the run if each card captures one shape, without deaths: as many cards for each shape as make the
        last of them end soonest, since a card can't be cut as work can."""
        work: Counter[GraphKey] = Counter()
        for shard in self.schedule.shards.values():
            work[shard.bucket.graph_key] += shard.images
        cards = dict.fromkeys(work, 1)
        for _ in range(len(self.cards) - len(cards)):
            cards[max(work, key=lambda key: work[key] / cards[key])] += 1
        of_all = sum(1 / SLOW_FACTOR if card.slow else 1.0 for card in self.cards) / len(self.cards)
        images = max(count / cards[key] for key, count in work.items())
        return START_S + CAPTURE_S + images * self.image_s / of_all

    def run(self) -> float:
        """Plays it to its end; returns its simulated seconds."""
        for card in self.cards:
            self._do(CardPlaced(card.number, card.node))
            self._later(START_S * self.rng.uniform(0.5, 1.5), self._ready, card, card.process)
        if self.deaths:
            self._later(self._next_death(), self._die)
        for part in (0.2, 0.4) if self.lost_nodes else ():
            self._later(part * self.ideal, self._lose_nodes)
        self._later(TICK_S, self._tick)
        while self._queue and not self.schedule.finished:
            self._now, _, happen, arguments = heapq.heappop(self._queue)
            happen(*arguments)
        return self._now

    def _tick(self) -> None:
        self._later(TICK_S, self._tick)
        if self.schedule.is_waiting_for_time():
            self._do(TimePassed(self._now))

    def _next_death(self) -> float:
        return self.rng.expovariate(DEATHS_PER_CARD_HOUR * len(self.cards) / 3600)

    def _later(self, seconds: float, happen: Callable[..., Any], *arguments: Any) -> None:
        heapq.heappush(self._queue, (self._now + seconds, next(self._tie), happen, arguments))

    def _do(self, event: Event) -> None:
        self.events += 1
        for decision in self._watch(lambda: self.schedule.handle(event)):
            if isinstance(decision, Assign):
                card = self.cards[decision.card]
                card.in_flight.append(decision.task)
                self.backups += decision.task.backup_of is not None
                self._work(card)
            elif isinstance(decision, Recall):
                self._later(RECALL_S, self._answer, decision)
            elif isinstance(decision, Drop):
                self._drop(self.cards[decision.card], decision.attempt)
            elif isinstance(decision, Commit):
                self._later(COMMIT_S, self._do, ShardCommitted(decision.shard))
            elif isinstance(decision, Replace):
                self._restart(self.cards[decision.card])
            elif isinstance(decision, Finish):
                self.reason = decision.reason
            elif isinstance(decision, Quarantine):
                self.quarantined += 1
                self._stop(self.cards[decision.card])

    def _ready(self, card: _Card, process: int) -> None:
        if card.process == process:
            loaded = LoadedCard(str(card.number), card.node, card.node, None, {}, "", 1)
            self._do(CardLoaded(card.number, loaded, self._now))

    def _work(self, card: _Card) -> None:
        if card.working or not card.in_flight:
            return
        card.working = True
        task = card.in_flight[0]
        card.reads += card.group != task.shard.group
        card.group = task.shard.group
        seconds = task.shard.images * self.image_s * self.rng.uniform(0.95, 1.05) * (SLOW_FACTOR if card.slow else 1.0)
        if self.hang and self.schedule.pending() == 0 and not task.announce:
            self.hang, card.hangs = False, True
        if card.hangs:
            seconds = math.inf
            self._later(HANG_LIMIT_S, self._overrun, card, card.process)
        self._later(0.0, self._begun, task)
        if task.shard.bucket.graph_key not in card.graphs:
            card.graphs.add(task.shard.bucket.graph_key)
            self.captures += 1
            seconds += CAPTURE_S
        self._later(seconds, self._done, card, card.process, task, seconds)

    def _done(self, card: _Card, process: int, task: ShardTask, seconds: float) -> None:
        if card.process != process or task not in card.in_flight:
            return
        card.in_flight.remove(task)
        card.working = False
        self._work(card)
        self._do(ShardMade(task.attempt, ShardOutcome(task.shard.rows, 0, 0, seconds=seconds)))

    def _begun(self, task: ShardTask) -> None:
        self._do(ShardBegun(task.attempt, True, self._now))

    def _drop(self, card: _Card, attempt: str) -> None:
        """A card that works on it ends it after its batch."""
        working = bool(card.in_flight) and card.in_flight[0].attempt == attempt
        card.in_flight = [task for task in card.in_flight if task.attempt != attempt]
        if not card.hangs:
            self._later(self.image_s * BATCH if working else 0.0, self._dropped, card, card.process, attempt, working)

    def _dropped(self, card: _Card, process: int, attempt: str, was_working: bool) -> None:
        if card.process == process:
            card.working = card.working and not was_working
            self._do(AttemptEnded(card.number, attempt))
            self._work(card)

    def _answer(self, recall: Recall) -> None:
        in_flight = self.cards[recall.card].in_flight
        given = [task for task in in_flight[1:] if task.attempt == recall.attempt]
        if any(task.attempt == recall.attempt for task in in_flight):
            for task in given:
                in_flight.remove(task)
            self._do(RecallAnswered(recall.attempt, bool(given)))

    def _die(self) -> None:
        self._later(self._next_death(), self._die)
        card = self.rng.choice(self.cards)
        if card.in_flight and not card.gone:
            self.dead += 1
            self._do(CardDied(card.number, "killed"))

    def _overrun(self, card: _Card, process: int) -> None:
        if card.process == process and not card.gone:
            self._do(CardDied(card.number, "limits.batch"))

    def _lose_nodes(self) -> None:
        """As when a rack loses its power; nodes of other names take their place."""
        lost = self.rng.sample(range(len(self.cards) // CARDS_OF_A_NODE), self.lost_nodes)
        gone = [card for card in self.cards if card.number // CARDS_OF_A_NODE in lost and not card.gone]
        for card in gone:
            for task in card.in_flight:
                self._do(ShardBegun(task.attempt, False))
        for card in gone:
            card.gone = True
            self._stop(card)
            self._do(CardGone(card.number))
        for card in gone:
            other = _Card(len(self.cards), card.slow)
            self.cards.append(other)
            self._do(CardPlaced(other.number, other.node))
            self._later(START_S, self._ready, other, other.process)

    def _restart(self, card: _Card) -> None:
        self._stop(card)
        self._later(START_S, self._ready, card, card.process)

    def _stop(self, card: _Card) -> None:
        card.process += 1
        card.group = -1
        card.in_flight.clear()
        card.graphs.clear()
        card.working = card.hangs = False


@dataclass(frozen=True)
class Case:
    """What is simulated; processes die in all cases."""

    cards: int
    keys: int = 1
    prompts: int = 1000
    """For each card."""
    slow: bool = True
    """Whether `SLOW_SHARE` of the cards are slow."""
    lost_nodes: int = 0
    """Nodes that are lost, twice."""
    hang: bool = False
    row_groups: int = 32

    def __str__(self) -> str:
        text = f"{self.cards:,} cards x {self.prompts:,} prompts, {self.keys} shape{'s' * (self.keys > 1)}"
        text += f", {SLOW_SHARE:.0%} slow" * self.slow + f", {2 * self.lost_nodes} nodes lost" * bool(self.lost_nodes)
        return text + ", one hangs at the end" * self.hang


CASES = [
    *(Case(cards, keys) for cards in (64, 1000, 10_000) for keys in (1, 6, 16)),
    *(Case(cards, 1, slow=False) for cards in (64, 1000, 10_000)),
    Case(256, 1, 2560),
    Case(1000, 6, lost_nodes=40),
    *(Case(cards, 1, hang=True) for cards in (64, 1000, 10_000)),
]
_seed = itertools.count()


def measure_case(case: Case, seed: int = 0) -> dict[str, float]:
    """The figures of one case; see the headings in `COLUMNS`."""
    inside = longest = 0.0

    def watch(call: Callable[[], list[Decision]]) -> list[Decision]:
        nonlocal inside, longest
        started = time.thread_time()  # CPU time: what else the machine does is of no interest here
        decisions = call()
        took = time.thread_time() - started
        inside, longest = inside + took, max(longest, took)
        return decisions

    simulation = Simulation(
        case.cards,
        case.keys,
        0,
        seed,
        lost_nodes=case.lost_nodes,
        watch=watch,
        prompts=case.prompts,
        hang=case.hang,
        row_groups=case.row_groups,
        slow_share=SLOW_SHARE if case.slow else 0.0,
    )
    best = simulation.best
    seconds = simulation.run()
    assert simulation.reason is None, simulation.reason
    return {
        "of_ideal": seconds / simulation.ideal,
        "of_best": seconds / best,
        "us_per_event": 1e6 * inside / simulation.events,
        "longest_ms": 1e3 * longest,
        "shards": len(simulation.schedule.shards),
        "captures": simulation.captures,
        "reads": simulation.reads,
        "deaths": simulation.dead,
        "backups": simulation.backups,
        "quarantined": simulation.quarantined,
    }


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures of each case, each time with other random numbers."""
    seed = next(_seed)
    one = Case(
        options.cards or 0,
        options.keys,
        options.prompts,
        not options.no_slow,
        options.lost_nodes,
        options.hang,
        options.row_groups,
    )
    for case in [one] if options.cards else CASES:
        yield str(case), measure_case(case, seed)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of one case."""
    parser.add_argument("--cards", type=int, help="measure one case, on so many cards")
    parser.add_argument("--keys", type=int, default=1, help="shapes of images")
    parser.add_argument("--prompts", type=int, default=1000, help="for each card")
    parser.add_argument("--no-slow", action="store_true", help="no card is slow")
    parser.add_argument("--hang", action="store_true", help="a card hangs in the last shard that is assigned")
    parser.add_argument("--row-groups", type=int, default=32, help="of the prompts")
    parser.add_argument("--lost-nodes", type=int, default=0, help="nodes that are lost, twice")


COLUMNS = {
    "of_ideal": ("of ideal", ".3f"),
    "of_best": ("of a capture a card", ".3f"),
    "us_per_event": ("CPU µs an event", ".1f"),
    "longest_ms": ("longest event, CPU ms", ".1f"),
    "shards": ("shards", ",.0f"),
    "captures": ("captures", ",.0f"),
    "reads": ("reads of a row group", ".2f"),
    "deaths": ("deaths", ".0f"),
    "backups": ("backup attempts", ".0f"),
}
BENCHMARK = Benchmark("schedule", __doc__, COLUMNS, measure, add_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
