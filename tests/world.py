"""The driver and the cards of a run, played without Ray: they carry out what the schedule decides."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.cards import MAX_IN_FLIGHT, CardState
from gaudi_batch.scheduling.decisions import (
    Admit,
    AskForCards,
    Assign,
    CheckStorage,
    Commit,
    Decision,
    Discard,
    Drop,
    DropCards,
    Finish,
    HoldBack,
    Quarantine,
    Recall,
    Release,
    Replace,
    ShardTask,
)
from gaudi_batch.scheduling.events import (
    AttemptEnded,
    BatchAnnounced,
    Capacity,
    CardBroken,
    CardDied,
    CardGone,
    CardLeaving,
    CardLoaded,
    CardPlaced,
    ClusterSeen,
    DoubtsChecked,
    Event,
    LoadedCard,
    Reading,
    ReadingAnnounced,
    RecallAnswered,
    ShardBegun,
    ShardCommitted,
    ShardFailed,
    ShardFailure,
    ShardMade,
    ShardOutcome,
    StorageChecked,
    TimePassed,
)
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.stack_vote import STACK_VOTE_TIMEOUT_S
from gaudi_batch.scheduling.state import Rules

CLUSTER_TIMEOUT_S = 1800.0
RULES = Rules(cluster_timeout_s=CLUSTER_TIMEOUT_S)
BUCKETS = [Bucket(64, 64, 20, 7.5), Bucket(64, 64, 20, 1.0), Bucket(128, 64, 20, 7.5)]


def loaded(card: int, node: str = "", *, module: int | None = None, torch: str = "2", now: float = 0.0) -> CardLoaded:
    """A card of this node has loaded its pipeline."""
    stack = {"torch": torch}
    return CardLoaded(card, LoadedCard(f"card {card}", node, f"host of {node}", module, stack, "model", 1), now)


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
    in_flight: dict[int, list[ShardTask]] = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)
    now: float = 0.0
    unplaced: list[int] = field(default_factory=list)
    starting: set[int] = field(default_factory=set)
    held_back: set[int] = field(default_factory=set)
    quarantined: set[int] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)
    recalls: list[Recall] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    commits: list[tuple[int, str]] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    checks: list[int] = field(default_factory=list)
    old: list[ShardTask] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)
    assigned_to: dict[int, list[int]] = field(default_factory=dict)
    finished: list[str | None] = field(default_factory=list)
    captured: set[tuple[int, object]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.handle: Callable[[Event], list[Decision]] = self.schedule.handle

    def do(self, decisions: list[Decision]) -> None:
        self.schedule.validate()
        alive = self.in_flight.keys() - {d.card for d in decisions if isinstance(d, (Replace, Quarantine, Release))}
        self.drops = [drop for drop in self.drops if drop.card in alive]
        for decision in decisions:
            assert not self.finished, f"{decision} after the end"
            if isinstance(decision, AskForCards):
                self.unplaced += decision.cards
            elif isinstance(decision, DropCards):
                self.unplaced = [card for card in self.unplaced if card not in decision.cards]
            elif isinstance(decision, HoldBack):
                self.held_back.add(decision.card)
            elif isinstance(decision, Admit):
                self.starting.remove(decision.card)
                self.held_back.discard(decision.card)
                self.in_flight[decision.card] = []
            elif isinstance(decision, Assign):
                task = decision.task
                number = task.shard.number
                assert number not in self.committed
                assert number not in [shard for shard, _ in self.commits]
                elsewhere = [a.attempt for tasks in self.in_flight.values() for a in tasks if a.shard.number == number]
                assert elsewhere == ([] if task.backup_of is None else [task.backup_of]), "in two hands"
                assert decision.card not in [drop.card for drop in self.drops], "a card that drops one gets another"
                assert decision.card not in self.leaving
                assert not self.in_flight[decision.card] or not task.announce, "a suspect shard behind another"
                assert not any(task.announce for task in self.in_flight[decision.card]), "a shard behind a suspect one"
                self.in_flight[decision.card].append(task)
                assert len(self.in_flight[decision.card]) <= MAX_IN_FLIGHT
                self.assigned_to.setdefault(number, []).append(decision.card)
            elif isinstance(decision, Recall):
                self.recalls.append(decision)
            elif isinstance(decision, Drop):
                self.drops.append(decision)
                tasks = self.in_flight[decision.card]
                self.old += [task for task in tasks if task.attempt == decision.attempt]
                self.in_flight[decision.card] = [task for task in tasks if task.attempt != decision.attempt]
                assert len(self.in_flight[decision.card]) == len(tasks) - 1
            elif isinstance(decision, Commit):
                assert decision.shard not in self.committed
                assert self.held.pop(decision.attempt) == decision.shard
                self.commits.append((decision.shard, decision.attempt))
            elif isinstance(decision, Discard):
                del self.held[decision.attempt]
            elif isinstance(decision, CheckStorage):
                self.checks.append(decision.shard.number)
            elif isinstance(decision, Replace):
                self.old += self.in_flight.pop(decision.card, [])
                self.held_back.discard(decision.card)
                self.starting.add(decision.card)
            elif isinstance(decision, Quarantine):
                self.old += self.in_flight.pop(decision.card, [])
                self.starting.discard(decision.card)
                self.held_back.discard(decision.card)
                self.quarantined.add(decision.card)
            elif isinstance(decision, Release):
                assert decision.card in self.leaving or self.schedule.stop_reason is not None
                self.held_back.discard(decision.card)
                assert not self.in_flight.pop(decision.card, [])
                self.starting.discard(decision.card)
                self.quarantined.discard(decision.card)
            elif isinstance(decision, Finish):
                self.finished.append(decision.reason)

    def wait(self, seconds: float) -> None:
        """Nothing happens for so long."""
        self.now += seconds
        self.do(self.handle(TimePassed(self.now)))

    def end_drop(self, drop: Drop) -> None:
        """A card is done with what it was told to drop."""
        self.drops.remove(drop)
        self.do(self.handle(AttemptEnded(drop.card, drop.attempt)))

    def see(self, more: int = 0, later: float = 0.0) -> None:
        """The driver looks at the cluster, which has so many cards more than the job has or waits for."""
        self.now += later
        states = {card: self.schedule.state(card) for card in self.nodes}
        here = {card for card, state in states.items() if state not in (CardState.GONE, CardState.LEAVING)}
        cards = len(here) + len(self.unplaced) + more
        nodes = frozenset(self.nodes[card] for card, state in states.items() if state is not CardState.GONE)
        self.do(self.handle(ClusterSeen(Capacity(cards, cards, nodes, frozenset()), self.now)))

    def join(self, card: int, node: str = "") -> None:
        self.unplaced = [number for number in self.unplaced if number != card]
        self.nodes[card] = node or f"node of {card}"
        self.do(self.handle(CardPlaced(card, self.nodes[card])))
        self.starting.add(card)

    def ready(self, card: int) -> None:
        self.do(self.handle(loaded(card, self.nodes[card], now=self.now)))

    def die(self, card: int, error: str = "killed") -> None:
        self.starting.discard(card)
        self.held_back.discard(card)
        self.old += self.in_flight.pop(card, [])
        self.do(self.handle(CardDied(card, error)))

    def break_down(self, card: int, error: str = "out of device memory") -> None:
        self.starting.discard(card)
        self.held_back.discard(card)
        self.old += self.in_flight.pop(card, [])
        self.do(self.handle(CardBroken(card, error)))

    def refuse(self, card: int) -> None:
        """A card loads, and has another stack than those that work, which has been settled."""
        self.do(self.handle(loaded(card, self.nodes[card], torch="1", now=self.now + STACK_VOTE_TIMEOUT_S)))

    def leave(self, card: int) -> None:
        self.starting.discard(card)
        self.held_back.discard(card)
        self.old += self.in_flight.pop(card, [])
        self.do(self.handle(CardGone(card)))

    def begin(self, card: int, all_of_it: bool = False) -> None:
        """A card reads what it has in hand and makes the first of it, or all of it while the first is stored."""
        for place, task in enumerate(self.in_flight.get(card, [])):
            self.do(self.handle(ShardBegun(task.attempt, place == 0 or all_of_it, self.now)))

    def check_storage(self, error: str | None = None, of_shard: str | None = None) -> None:
        """The driver looks at storage itself, if it was asked to."""
        if self.checks:
            self.do(self.handle(StorageChecked(self.checks.pop(0), error, of_shard)))

    def lose_node(self, card: int) -> None:
        """All cards of its node are gone at once, after they have begun what they had in hand."""
        for number, node in self.nodes.items():
            if node == self.nodes[card]:
                self.begin(number)
        for number, node in self.nodes.items():
            if node == self.nodes[card] and (number in self.in_flight or number in self.starting):
                self.leave(number)

    def take_leave(self, card: int) -> None:
        self.leaving.add(card)
        self.do(self.handle(CardLeaving(card)))

    def finish_first(self, card: int, failed: int = 0, undecoded: int = 0, **outcome: Any) -> None:
        task = self.in_flight[card].pop(0)
        if task.confirm:
            self.do(self.handle(DoubtsChecked(task.attempt, dict.fromkeys(task.confirm, "wrong") if failed else {})))
            return
        graph = (card, task.shard.bucket.graph_key)
        seconds = 1.0 if graph in self.captured else 50.0
        self.captured.add(graph)
        self.held[task.attempt] = task.shard.number
        rows = failed + undecoded
        self.do(
            self.handle(ShardMade(task.attempt, ShardOutcome(self.rows, rows, failed, undecoded, seconds, **outcome)))
        )

    def fail_first(self, card: int, failed_alone_once: bool, healthy: bool) -> None:
        task = self.in_flight[card].pop(0)
        rows = {task.shard.start: "boom"} if failed_alone_once else {}
        self.do(self.handle(ShardFailed(task.attempt, ShardFailure("boom", rows, healthy=healthy))))

    def commit_first(self) -> None:
        shard, _ = self.commits.pop(0)
        self.committed.add(shard)
        self.do(self.handle(ShardCommitted(shard)))

    def answer_recall(self, give_back: bool) -> None:
        recall = self.recalls.pop(0)
        tasks = self.in_flight.get(recall.card, [])
        recalled = [task for task in tasks if task.attempt == recall.attempt]
        # A card that is working on a shard already keeps it.
        given = bool(recalled) and give_back and recalled[0] is not tasks[0]
        if given:
            tasks.remove(recalled[0])
        if recalled:
            self.do(self.handle(RecallAnswered(recall.attempt, given)))


def let_it_end(world: World, new_card: int) -> None:
    """From here on nothing goes wrong; the run has to end within a bounded number of events."""
    if not world.finished and not world.in_flight.keys() - world.leaving and not world.starting:
        world.join(new_card)
    world.see()
    for _ in range(10_000):
        if world.finished:
            return
        if world.commits:
            world.commit_first()
        elif world.recalls:
            world.answer_recall(True)
        elif world.drops:
            world.end_drop(world.drops[0])
        elif world.unplaced:
            world.join(world.unplaced[0])
        elif world.starting - world.held_back:
            world.ready(next(iter(world.starting - world.held_back)))
        else:
            busy = [card for card, tasks in world.in_flight.items() if tasks]
            if not busy and world.held_back:
                world.see(later=STACK_VOTE_TIMEOUT_S)
                continue
            if not busy:
                world.see(later=CLUSTER_TIMEOUT_S + 1)  # the driver looks at the cluster again and again
                if world.finished:
                    return
            assert busy, "nothing happens any more and the run has not ended"
            world.finish_first(busy[0])
    raise AssertionError("the run does not end")


def start(world: World, cards: int, per_node: int | None = None) -> None:
    """So many cards are ready, on one node or on several."""
    for card in range(cards):
        world.join(card, f"node {card // per_node}" if per_node else "")
    for card in range(cards):
        world.ready(card)


def anything_happens(world: World, rng: random.Random) -> None:
    """One event of those that can happen now, likely ones more often."""
    busy = [card for card, tasks in world.in_flight.items() if tasks]
    alive = sorted(world.in_flight) + sorted(world.starting)
    possible = (
        (["ready"] * 4 + ["refuse"]) * bool(world.starting - world.held_back)
        + ["finish"] * 6 * bool(busy)
        + ["fail", "announce"] * bool(busy)
        + ["commit"] * 6 * bool(world.commits)
        + ["recall"] * 4 * bool(world.recalls)
        + ["die"] * bool(alive)
        + ["leave"] * (len(alive) > 1)
        + ["take leave"] * (len(alive) > 1)
        + ["late"] * 2 * bool(world.old)
        + ["hope", "lose hope"]
        + ["check"] * bool(world.checks)
    )
    event = rng.choice(possible)
    if event == "ready":
        world.ready(rng.choice(sorted(world.starting - world.held_back)))
    elif event == "refuse":
        world.refuse(rng.choice(sorted(world.starting - world.held_back)))
    elif event == "finish":
        card = rng.choice(busy)
        doubted = {world.in_flight[card][0].shard.start: "wrong"} if rng.random() < 0.2 else {}
        world.finish_first(card, rng.choice([0, 0, 1]), doubted=doubted, transient_failures=rng.choice([0, 0, 2]))
    elif event == "fail":
        world.fail_first(rng.choice(busy), rng.random() < 0.5, rng.random() < 0.5)
    elif event == "announce":
        first = world.in_flight[rng.choice(busy)][0]
        world.begin(next(card for card, tasks in world.in_flight.items() if first in tasks))
        rows = range(first.shard.start, first.shard.start + rng.randint(1, 4))
        world.do(world.handle(BatchAnnounced(first.attempt, tuple(rows))))
        if rng.random() < 0.3:
            world.do(world.handle(ReadingAnnounced(first.attempt, Reading(0, rows, rows, by_row=rng.random() < 0.5))))
    elif event == "check":
        world.check_storage(of_shard=rng.choice([None, None, "its rows can't be read"]))
    elif event == "commit":
        world.commit_first()
    elif event == "recall":
        world.answer_recall(rng.random() < 0.5)
    elif event == "die":
        rng.choice([world.die, world.break_down])(rng.choice(alive))
    elif event == "leave":
        world.lose_node(rng.choice(alive))
    elif event == "take leave":
        world.take_leave(rng.choice(alive))
    elif event in ("hope", "lose hope"):
        world.see(more=event == "hope")
    elif event == "late":
        attempt = rng.choice(world.old).attempt
        late = [
            world.handle(ShardMade(attempt, ShardOutcome(4, 0, 0))),
            world.handle(ShardFailed(attempt, ShardFailure("late"))),
            world.handle(DoubtsChecked(attempt, {})),
            world.handle(ShardBegun(attempt, True)),
            world.handle(BatchAnnounced(attempt, (1,))),
            world.handle(RecallAnswered(attempt, True)),
        ]
        assert not any(late)
