"""Who of a job's nodes fetches a model from whom: the origin is asked once, and no death keeps others waiting."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from gaudi_batch.cluster import model_peers
from gaudi_batch.cluster.model_peers import ORIGIN, READERS, ModelPeers, ModelTracker, Source


class Actor:
    """A card that lives, or has died."""

    def __init__(self, lives: bool = True) -> None:
        self.lives = lives

    @property
    def __ray_ready__(self) -> Any:
        return SimpleNamespace(remote=self._answer)

    async def _answer(self) -> None:
        if not self.lives:
            raise RayActorError


def played(play: Callable[[ModelTracker], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(play(ModelTracker()), 20)

    asyncio.run(run())


def test_the_origin_is_asked_once_and_nodes_that_have_a_model_give_it_to_two_at_a_time() -> None:
    given, at_once, most = Counter[str](), Counter[str](), Counter[str]()

    async def fetch(tracker: ModelTracker, name: str) -> None:
        source = await tracker.turn("model", 1, Source(name, Actor()))
        place = source.name if source else ORIGIN
        given[place] += 1
        at_once[place] += 1
        most[place] = max(most[place], at_once[place])
        for _ in range(10):
            await asyncio.sleep(0)
        at_once[place] -= 1
        await tracker.offer("model", Source(name, Actor()))
        await tracker.end("model", place, name, lost=False)

    async def play(tracker: ModelTracker) -> None:
        await asyncio.gather(*(fetch(tracker, f"node {number}") for number in range(64)))

    played(play)
    assert given[ORIGIN] == 1
    assert sum(given.values()) == 64
    assert max(most.values()) == READERS


def test_as_many_as_a_store_can_serve_begin_at_once() -> None:
    async def play(tracker: ModelTracker) -> None:
        for number in range(4):
            assert await tracker.turn("model", 4, Source(str(number), Actor())) is None
        fifth = asyncio.ensure_future(tracker.turn("model", 4, Source("4", Actor())))
        await asyncio.sleep(0.01)
        assert not fifth.done()
        await tracker.offer("another model", Source("0", Actor()))
        await asyncio.sleep(0.01)
        assert not fifth.done()
        await tracker.offer("model", Source("0", Actor()))
        source = await fifth
        assert source is not None
        assert source.name == "0"

    played(play)


def test_one_that_dies_amid_its_turn_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_peers, "CHECK_INTERVAL_S", 0.01)

    async def play(tracker: ModelTracker) -> None:
        first = Actor()
        assert await tracker.turn("model", 1, Source("first", first)) is None
        second = asyncio.ensure_future(tracker.turn("model", 1, Source("second", Actor())))
        await asyncio.sleep(0.1)
        assert not second.done(), "the first lives"
        first.lives = False
        assert await second is None

    played(play)


def test_a_card_that_can_not_give_its_model_is_asked_no_more() -> None:
    async def play(tracker: ModelTracker) -> None:
        await tracker.offer("model", Source("holder", Actor()))
        source = await tracker.turn("model", 1, Source("reader", Actor()))
        assert source is not None
        await tracker.end("model", source.name, "reader", lost=True)
        assert await tracker.turn("model", 1, Source("reader", Actor())) is None

    played(play)


def test_one_that_died_while_it_waited_gets_no_turn() -> None:
    async def play(tracker: ModelTracker) -> None:
        assert await tracker.turn("model", 1, Source("a-1", Actor())) is None
        dead = Actor()
        turns = [
            asyncio.ensure_future(tracker.turn("model", 1, Source(name, actor)))
            for name, actor in (("b-1", dead), ("c-1", dead), ("d-1", Actor()))
        ]
        await asyncio.sleep(0.01)
        dead.lives = False
        await tracker.end("model", ORIGIN, "a-1", lost=False)
        await turns[2]  # at once, and not after each of the dead
        assert tracker._busy("model", ORIGIN) == 1

    played(play)


def test_a_slow_reader_keeps_nobody_from_the_origin_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_peers, "CHECK_INTERVAL_S", 0.01)

    async def play(tracker: ModelTracker) -> None:
        assert await tracker.turn("model", 1, Source("slow-1", Actor())) is None
        second = asyncio.ensure_future(tracker.turn("model", 1, Source("b-1", Actor())))
        await asyncio.sleep(0.05)
        assert not second.done()
        monkeypatch.setattr(model_peers, "SLOW_S", 0.0)
        assert await second is None

    played(play)


def test_the_cards_of_a_node_give_to_two_nodes_together() -> None:
    async def play(tracker: ModelTracker) -> None:
        for card in range(8):
            await tracker.offer("model", Source(f"holder-{card}", Actor()))
        for number in range(READERS):
            assert await tracker.turn("model", 1, Source(f"{number}-1", Actor())) is not None
        third = asyncio.ensure_future(tracker.turn("model", 1, Source("third-1", Actor())))
        await asyncio.sleep(0.01)
        assert not third.done()
        await tracker.end("model", "holder-7", "0-1", lost=False)
        assert await third is not None

    played(play)


def test_others_can_see_a_model_before_the_turn_of_its_card_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor with asynchronous methods may begin a call before one that was made before it."""
    calls: list[str] = []

    def method(name: str) -> Any:
        def remote(*_: Any) -> str:
            calls.append(f"ask {name}")
            return name

        return SimpleNamespace(remote=remote)

    tracker = SimpleNamespace(turn=method("turn"), offer=method("offer"), end=method("end"))
    monkeypatch.setattr("ray.get", lambda name, timeout=None: calls.append(f"got {name}"))
    origin: Any = SimpleNamespace(revision="model", readers=1)
    model: Any = SimpleNamespace()
    peers = ModelPeers(tracker, Source("a-1", Actor()))
    with peers.turn(origin):
        peers.offer("model", model)
    assert calls == ["ask turn", "got turn", "ask offer", "got offer", "ask end"]


def test_a_card_that_can_not_be_asked_for_a_while_has_not_died() -> None:
    def raising(error: Exception) -> Any:
        async def ask() -> None:
            raise error

        return SimpleNamespace(__ray_ready__=SimpleNamespace(remote=ask))

    assert asyncio.run(model_peers._lives(raising(ActorUnavailableError("busy", None))))
    assert not asyncio.run(model_peers._lives(raising(RayError("gone"))))
