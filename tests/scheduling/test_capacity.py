"""How many cards a run asks the cluster for, when some of its cards do not work, and when it stops waiting for one."""

from __future__ import annotations

import pytest
from world import loaded, shards

from gaudi_batch.scheduling.admission import Requirements
from gaudi_batch.scheduling.card_events import MAX_START_FAILURES
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.decisions import (
    AskForCards,
    CheckStorage,
    Decision,
    DropCards,
    Finish,
    GiveBack,
    NoteFault,
    Quarantine,
    Release,
    Replace,
)
from gaudi_batch.scheduling.events import (
    Capacity,
    CardBroken,
    CardDied,
    CardGone,
    CardPlaced,
    ClusterSeen,
    RunFailed,
    StopForced,
    StopRequested,
    StorageChecked,
)
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules

NODES = frozenset("ABCDEFGHIJ")


class Job:
    """A run, and the cards that it has asked for."""

    def __init__(self, count: int, max_cards: int | None = None, min_cards: int = 0, timeout_s: float = 60.0) -> None:
        rules = Rules(max_cards=max_cards, min_cards=min_cards, cluster_timeout_s=timeout_s)
        self.schedule = Schedule(shards(count), "a", RowCounts(4 * count), rules)
        self.unplaced: list[int] = []
        self.asked = 0
        self.over: list[str | None] = []

    def see(self, cards: int, total: int, now: float = 0.0, nodes: frozenset[str] = NODES) -> list[Decision]:
        """The driver looks at the cluster."""
        decisions = self.schedule.handle(ClusterSeen(Capacity(cards, total, nodes, frozenset()), now))
        for decision in decisions:
            if isinstance(decision, AskForCards):
                self.unplaced += decision.cards
                self.asked += len(decision.cards)
            elif isinstance(decision, DropCards):
                self.unplaced = [card for card in self.unplaced if card not in decision.cards]
            elif isinstance(decision, Finish):
                self.over.append(decision.reason)
        return decisions

    def place(self, node: str) -> int:
        """The cluster places the next card, which begins to load."""
        card = self.unplaced.pop(0)
        self.schedule.handle(CardPlaced(card, node))
        return card

    def fail(self, card: int) -> None:
        """It can't load."""
        for _ in range(MAX_START_FAILURES):
            for decision in self.schedule.handle(CardBroken(card, "no")):
                if isinstance(decision, Finish):
                    self.over.append(decision.reason)


def test_no_card_is_asked_for_that_would_have_nothing_to_do() -> None:
    job = Job(3, max_cards=16)
    job.see(0, 0)
    assert job.asked == 3
    cards = [job.place("A") for _ in range(3)]
    job.see(3, 3)
    for card in cards:
        job.schedule.handle(loaded(card, "A"))
    job.see(3, 3)
    assert job.asked == 3


@pytest.mark.parametrize(("per_node", "cards", "tried"), [(8, 1, 2), (64, 2, 4), (1, 1, 2)])
def test_where_every_card_fails_as_many_again_are_tried(per_node: int, cards: int, tried: int) -> None:
    job = Job(4)
    while not job.over:
        before = job.asked
        job.see(cards, 64)
        while job.unplaced:
            job.fail(job.place("ABCDEFGHIJ"[(job.asked - len(job.unplaced)) // per_node]))
        assert job.asked > before or job.over, "nothing happens any more"
    assert job.asked == tried


@pytest.mark.parametrize(
    ("bad", "total", "wanted"),
    [
        (0, 8, 2),
        (1, 8, 3),  # the node has another
        (1, 2, 2),  # it has none, and still works in part
        (2, 2, 4),  # nothing of it works
    ],
)
def test_another_node_is_asked_for_when_nothing_of_one_works(bad: int, total: int, wanted: int) -> None:
    for asked in ({"max_cards": 2}, {"min_cards": 2}):
        job = Job(40, **asked)
        job.see(2, 2)
        cards = [job.place("A") for _ in range(2)]
        for card in cards[:bad]:
            job.fail(card)
        job.see(2, total)
        assert job.asked == wanted


def test_a_card_that_nothing_would_be_left_for_is_not_waited_for() -> None:
    job = Job(40)
    job.see(4, 4)
    first = job.unplaced[0]
    assert job.see(1, 1) == [DropCards((3, 2, 1))], "the newest go first"
    assert job.unplaced == [first]


def test_a_cluster_without_a_card_that_works_is_given_up_after_its_limit_and_no_sooner() -> None:
    job = Job(4)
    job.see(1, 1, now=100.0)
    card = job.place("A")
    job.schedule.handle(loaded(card, "A"))
    job.see(1, 1, now=5000.0)
    job.schedule.handle(CardGone(card))
    job.see(0, 0, now=5060.0, nodes=frozenset())
    assert not job.over
    job.see(0, 0, now=5060.5, nodes=frozenset())
    assert job.over == ["the cluster has had no card that works for 60 s (limits.cluster)"]


def test_a_card_that_others_hold_is_waited_for_as_long_as_it_takes() -> None:
    job = Job(4)
    for hour in range(10):
        job.see(1, 1, now=3600.0 * hour)
    assert not job.over


def test_a_quarantined_card_whose_node_is_gone_gives_its_place_back() -> None:
    job = Job(4)
    job.see(1, 2)
    card = job.place("A")
    job.fail(card)
    assert GiveBack(card) not in job.see(1, 2)
    assert GiveBack(card) in job.see(1, 2, nodes=NODES - {"A"})


def test_storage_that_fails_for_the_driver_too_ends_the_run_with_its_error() -> None:
    job = Job(4)
    job.see(1, 1)
    card = job.place("A")
    decisions = job.schedule.handle(CardBroken(card, "can't read run.json", storage=True))
    assert any(isinstance(decision, CheckStorage) for decision in decisions)
    assert job.schedule.handle(StorageChecked(0, "no space left")) == [Finish("no space left")]


def test_what_the_run_can_not_go_on_without_ends_it_once() -> None:
    for event in (RunFailed("storage has failed"), StopForced("interrupted")):
        job = Job(4)
        job.see(1, 1)
        assert job.schedule.handle(event) == [Finish(event.reason)]
        assert job.schedule.handle(RunFailed("again")) == []


def test_a_module_that_ray_gives_to_a_second_card_keeps_its_first_one() -> None:
    job = Job(4)
    job.see(2, 2)
    first, second = job.place("A"), job.place("A")
    job.schedule.handle(loaded(first, "A", module=3))
    decisions = job.schedule.handle(loaded(second, "A", module=3))
    assert Replace(second) in decisions
    (fault,) = [decision for decision in decisions if isinstance(decision, NoteFault)]
    assert fault == NoteFault(second, f"Ray gave it module 3 of node host of A, which card card {first} holds")
    assert Replace(second) not in job.schedule.handle(loaded(second, "A", module=4))


def test_a_card_whose_node_has_announced_its_end_gets_nothing_more_and_is_released() -> None:
    job = Job(4)
    job.see(1, 1)
    card = job.place("A")
    job.schedule.handle(loaded(card, "A"))
    capacity = Capacity(0, 0, NODES, frozenset("A"))
    job.schedule.handle(ClusterSeen(capacity, 1.0))
    assert job.schedule.state(card) is CardState.LEAVING
    decisions = job.schedule.handle(CardDied(card, "its node went down"))
    assert Release(card) in decisions
    assert job.schedule.handle(CardGone(card)) == [], "that it is gone is known"


def test_a_node_with_fewer_cpus_than_a_card_has_threads_is_refused() -> None:
    """On the cpu images depend on the threads."""
    rules = Rules(requirements=Requirements(threads=8, min_cpus=8))
    schedule = Schedule(shards(4), "a", RowCounts(16), rules)
    schedule.handle(CardPlaced(0, "A"))
    decisions = schedule.handle(loaded(0, "A"))
    (quarantine,) = [decision for decision in decisions if isinstance(decision, Quarantine)]
    assert "may use 1 CPUs (affinity, cgroup), and a card of this run has 8 threads" in quarantine.reason


def test_a_second_word_of_a_process_that_has_loaded_changes_nothing() -> None:
    job = Job(4)
    job.see(1, 1)
    card = job.place("A")
    assert job.schedule.handle(loaded(card, "A"))
    assert job.schedule.handle(loaded(card, "A")) == []


def test_what_a_reader_may_ask_of_a_run() -> None:
    job = Job(4)
    job.see(1, 1)
    card = job.place("A")
    job.schedule.handle(loaded(card, "A"))
    job.schedule.handle(StopRequested("interrupted"))
    schedule = job.schedule
    assert (schedule.stop_reason, schedule.finished) == ("interrupted", False)
    assert (schedule.pending(), schedule.retries, schedule.failed_rows, schedule.done_rows) == (2, 0, 0, 0)
    assert schedule.is_live("a1")
    assert not schedule.is_live("a9")
