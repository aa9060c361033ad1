"""How many places a job takes in a cluster, when some of its cards do not work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gaudi_batch.cluster.connection import Capacity
from gaudi_batch.driver.loop import Driver
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.decisions import Finish
from gaudi_batch.scheduling.schedule import MAX_START_FAILURES, Schedule

BUCKET = Bucket(64, 64, 20, 2.0)


class Places(Driver):
    """A driver's places alone, without Ray."""

    def __init__(self, shards: int, max_cards: int | None = None, min_cards: int = 0) -> None:
        plan = [Shard(number, 0, 4 * number, 4 * number + 4, BUCKET, 4, 4) for number in range(shards)]
        self.schedule = Schedule(plan, "a", 4 * shards)
        self._setup: Any = SimpleNamespace(config=SimpleNamespace(max_cards=max_cards, min_cards=min_cards))
        self._slots: Any = {}

    def place(self, number: int, node: str) -> None:
        """The cluster places a card, which begins to load."""
        self._slots[number] = SimpleNamespace(number=number, node_id=node)
        self.schedule.starting(number, node)

    def fail(self, number: int) -> bool:
        """It can't load; returns whether that ends the run."""
        decisions = [decision for _ in range(MAX_START_FAILURES) for decision in self.schedule.broken(number, "no")]
        return any(isinstance(decision, Finish) for decision in decisions)

    def wanted(self, cards: int, there: int) -> int:
        return self._wanted(Capacity(cards, there, frozenset("ABCDEFGHIJ"), frozenset()))


def test_no_card_is_asked_for_that_would_have_nothing_to_do() -> None:
    places = Places(3, max_cards=16)
    assert places.wanted(0, 0) == 3
    for number in range(3):
        places.place(number, "A")
        assert places.wanted(3, 3) == 3
    for number in range(3):
        places.schedule.ready(number)
    assert places.wanted(3, 3) == 3


@pytest.mark.parametrize(("per_node", "cards", "tried"), [(8, 1, 2), (64, 2, 4), (1, 1, 2)])
def test_where_every_card_fails_as_many_again_are_tried(per_node: int, cards: int, tried: int) -> None:
    places, over = Places(4), False
    while not over:
        here = places._slots_in(*set(CardState) - {CardState.GONE})
        before = len(places._slots)
        for number in range(before, before + places.wanted(cards, 64) - len(here)):
            places.place(number, "ABCDEFGHIJ"[number // per_node])
            over = places.fail(number) or over
        if len(places._slots) == before:
            over = any(isinstance(decision, Finish) for decision in places.schedule.expect(False))
    assert len(places._slots) == tried


@pytest.mark.parametrize(
    ("bad", "there", "wanted"),
    [
        (0, 8, 2),
        (1, 8, 3),  # the node has another
        (1, 2, 2),  # it has none, and still works in part
        (2, 2, 4),  # nothing of it works
    ],
)
def test_another_node_is_asked_for_when_nothing_of_one_works(bad: int, there: int, wanted: int) -> None:
    for asked in ({"max_cards": 2}, {"min_cards": 2}):
        places = Places(40, **asked)
        for number in range(2):
            places.place(number, "A")
        for number in range(bad):
            places.fail(number)
        assert places.wanted(2, there) == wanted
