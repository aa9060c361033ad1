"""The thread that starts cards early ends however Ray answers it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from gaudi_batch.driver import early
from gaudi_batch.driver.early import _Started
from gaudi_batch.errors import RunStopped


class Places:
    """Gives a place as soon as it may; notes what it is asked."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.asked = threading.Event()
        self.calls: list[str] = []

    def create_early(self, numbers: set[int]) -> None:
        self.calls.append("create")

    def placed(self, numbers: set[int]) -> dict[int, str]:
        self.asked.set()
        assert self.answers.wait(60)
        return dict.fromkeys(numbers, "node")

    def start(self, number: int) -> None:
        self.calls.append(f"start {number}")

    def close(self) -> None:
        self.calls.append("close")


def started(places: Places) -> _Started:
    cards: Any = SimpleNamespace(places=places)
    made = _Started(cards, 1)
    assert places.asked.wait(60)
    return made


def test_a_ray_that_does_not_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "ANSWER_TIMEOUT_S", 0.01)
    monkeypatch.setattr(early, "CLOSE_TIMEOUT_S", 0.01)
    places = Places()
    cards = started(places)
    with pytest.raises(RunStopped, match="Ray has not answered for 0 s; the same command resumes"):
        cards.settle()
    cards.give_back()
    places.answers.set()
    cards._thread.join(60)
    assert places.calls == ["create", "start 0", "close"], "when it answers after all, nothing is left behind"


def test_what_is_taken_is_not_given_back() -> None:
    places = Places()
    cards = started(places)
    places.answers.set()
    cards.settle()
    cards.let_go()
    assert places.calls == ["create", "start 0"]


def test_a_signal_waits_until_the_cards_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not be left while it is asked."""
    places = Places()
    cards = started(places)
    join, joins = cards._thread.join, []

    def interrupted_once(timeout: float | None = None) -> None:
        joins.append(timeout)
        if len(joins) == 1:
            places.answers.set()
            raise KeyboardInterrupt
        join(timeout)

    monkeypatch.setattr(cards._thread, "join", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        cards.give_back()
    assert places.calls == ["create", "start 0", "close"]
