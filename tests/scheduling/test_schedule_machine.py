"""Whatever the order of events, the schedule loses no shard, commits none twice, and ends.

Hypothesis chooses what happens next among all that can, late events of the dead among it, and shrinks what fails. The
world carries out what the schedule decides and checks its invariants after each event.
"""

from __future__ import annotations

from dataclasses import replace

from helpers import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import RULES, World, let_it_end, shards

from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.scheduling.event_log import EventLog, replay
from gaudi_batch.scheduling.events import (
    BatchAnnounced,
    DoubtsChecked,
    Reading,
    ReadingAnnounced,
    RecallAnswered,
    ShardBegun,
    ShardFailed,
    ShardFailure,
    ShardMade,
    ShardOutcome,
    StopRequested,
)
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts

MAX_CARDS = 8
ROWS = 4
"""Of a shard."""
TOLD = "told to stop"
ENDS = (TOLD, "no card is left", "nodes in a row", "no card that works")
"""What the reason of a run says that ended with shards left, none of which is stuck."""


class ScheduleMachine(RuleBasedStateMachine):
    """A run of which anything can happen at any time."""

    @initialize(
        count=st.integers(1, 12),
        keys=st.integers(1, 3),
        graphs=st.integers(1, 3),
        cards=st.integers(1, 5),
        max_events=st.sampled_from([3, 10_000]),
    )
    def begin(self, count: int, keys: int, graphs: int, cards: int, max_events: int) -> None:
        self.count = count
        schedule = Schedule(
            shards(count, buckets=keys), "a", RowCounts(ROWS * count), replace(RULES, max_graphs=graphs)
        )
        self.log = EventLog(schedule, max_events)
        self.world = World(schedule)
        self.world.handle = self.log.handle
        self.lost = [0, 0, 0]  # how often each node was lost; one that comes in its place has another name
        for card in range(cards):
            self.join(card, card % 3)

    def join(self, card: int, node: int) -> None:
        self.world.join(card, f"node {node}.{self.lost[node]}")

    def pick(self, data: st.DataObject, cards: set[int]) -> int:
        return data.draw(st.sampled_from(sorted(cards)), "card")

    def goes_on(self) -> bool:
        return not self.world.finished

    def loading(self) -> set[int]:
        return self.world.starting - self.world.held_back

    def busy(self) -> set[int]:
        return {card for card, tasks in self.world.in_flight.items() if tasks}

    def alive(self) -> set[int]:
        return self.world.in_flight.keys() | self.world.starting

    @precondition(lambda self: self.goes_on() and len(self.world.nodes) < MAX_CARDS)
    @rule(node=st.integers(0, 2))
    def a_card_joins(self, node: int) -> None:
        card = self.world.unplaced[0] if self.world.unplaced else 100 + len(self.world.nodes)
        self.join(card, node)

    @precondition(lambda self: self.goes_on() and self.loading())
    @rule(data=st.data(), odd=st.sampled_from([False] * 4 + [True]))
    def a_card_loads(self, data: st.DataObject, odd: bool) -> None:
        card = self.pick(data, self.loading())
        self.world.refuse(card) if odd else self.world.ready(card)

    @precondition(lambda self: self.goes_on() and self.busy())
    @rule(
        data=st.data(),
        failed=st.sampled_from([0, 0, 1]),
        doubted=st.sampled_from([False] * 4 + [True]),
        transient=st.sampled_from([0, 0, 2]),
    )
    def a_shard_is_made(self, data: st.DataObject, failed: int, doubted: bool, transient: int) -> None:
        card = self.pick(data, self.busy())
        rows = {self.world.in_flight[card][0].shard.start: "wrong"} if doubted else {}
        self.world.finish_first(card, failed, doubted=rows, transient_failures=transient)

    @precondition(lambda self: self.goes_on() and self.busy())
    @rule(data=st.data(), alone=st.booleans(), healthy=st.booleans())
    def a_shard_fails(self, data: st.DataObject, alone: bool, healthy: bool) -> None:
        self.world.fail_first(self.pick(data, self.busy()), alone, healthy)

    @precondition(lambda self: self.goes_on() and self.busy())
    @rule(data=st.data(), rows=st.integers(1, ROWS), reading=st.sampled_from(["no", "no", "at once", "by row"]))
    def a_card_announces(self, data: st.DataObject, rows: int, reading: str) -> None:
        card = self.pick(data, self.busy())
        task = self.world.in_flight[card][0]
        self.world.begin(card)
        span = range(task.shard.start, task.shard.start + rows)
        self.world.do(self.world.handle(BatchAnnounced(task.attempt, tuple(span))))
        if reading != "no":
            announced = Reading(0, span, span, by_row=reading == "by row")
            self.world.do(self.world.handle(ReadingAnnounced(task.attempt, announced)))

    @precondition(lambda self: self.goes_on() and self.world.commits)
    @rule()
    def a_commit_is_in_place(self) -> None:
        self.world.commit_first()

    @precondition(lambda self: self.goes_on() and self.world.recalls)
    @rule(given_back=st.booleans())
    def a_recall_is_answered(self, given_back: bool) -> None:
        self.world.answer_recall(given_back)

    @precondition(lambda self: self.goes_on() and self.busy())
    @rule(data=st.data(), all_of_it=st.booleans())
    def a_card_begins(self, data: st.DataObject, all_of_it: bool) -> None:
        self.world.begin(self.pick(data, self.busy()), all_of_it)

    @precondition(lambda self: self.goes_on())
    @rule(seconds=st.sampled_from([0.5, 5.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.wait(seconds)

    @precondition(lambda self: self.goes_on() and self.world.drops)
    @rule(data=st.data())
    def an_attempt_is_dropped(self, data: st.DataObject) -> None:
        self.world.end_drop(data.draw(st.sampled_from(self.world.drops), "drop"))

    @precondition(lambda self: self.goes_on() and self.alive())
    @rule(data=st.data(), by_its_own_word=st.booleans())
    def a_process_dies(self, data: st.DataObject, by_its_own_word: bool) -> None:
        card = self.pick(data, self.alive())
        self.world.break_down(card) if by_its_own_word else self.world.die(card)

    @precondition(lambda self: self.goes_on() and len(self.alive()) > 1)
    @rule(data=st.data(), announced=st.booleans())
    def a_node_goes(self, data: st.DataObject, announced: bool) -> None:
        card = self.pick(data, self.alive())
        if announced:
            self.world.take_leave(card)
        else:
            self.lost[int(self.world.nodes[card][5])] += 1
            self.world.lose_node(card)

    @precondition(lambda self: self.goes_on())
    @rule(more=st.integers(0, 2), later=st.sampled_from([0.0, 2.0, 100.0]))
    def the_cluster_is_seen(self, more: int, later: float) -> None:
        self.world.see(more, later)

    @precondition(lambda self: self.goes_on() and self.world.checks)
    @rule(unreadable=st.booleans())
    def storage_is_checked(self, unreadable: bool) -> None:
        self.world.check_storage(of_shard="its rows can't be read" if unreadable else None)

    @precondition(lambda self: self.goes_on())
    @rule(really=st.sampled_from([False] * 9 + [True]))
    def it_is_told_to_stop(self, really: bool) -> None:
        if really:
            self.world.do(self.world.handle(StopRequested(TOLD)))

    @precondition(lambda self: self.world.finished)
    @rule()
    def nothing_is_decided_after_the_end(self) -> None:
        assert self.world.handle(StopRequested("too late")) == []

    @precondition(lambda self: self.world.old)
    @rule(data=st.data())
    def an_event_of_the_dead_comes_late(self, data: st.DataObject) -> None:
        task: ShardTask = data.draw(st.sampled_from(self.world.old), "attempt")
        late = (
            ShardMade(task.attempt, ShardOutcome(ROWS, 0, 0)),
            ShardFailed(task.attempt, ShardFailure("late")),
            DoubtsChecked(task.attempt, {}),
            ShardBegun(task.attempt, True),
            BatchAnnounced(task.attempt, (1,)),
            RecallAnswered(task.attempt, True),
        )
        assert not any([self.world.handle(event) for event in late])

    @invariant()
    def the_state_agrees_with_itself(self) -> None:
        if hasattr(self, "world"):
            self.world.schedule.validate()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        let_it_end(self.world, 999)
        (reason,) = self.world.finished
        if reason is None:
            assert self.world.committed == set(range(self.count))
        else:
            assert self.world.schedule.stuck or any(end in reason for end in ENDS), reason
        assert replay(self.log.dump())[1] == [], "the log of the run, replayed, decides the same"


TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = settings(max_examples=examples(200), stateful_step_count=50, deadline=None)
