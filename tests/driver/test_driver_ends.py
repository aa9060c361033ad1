"""A driver ends when it is told to, and takes no card for silent because it stood still itself."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RaySystemError

from gaudi_batch.cluster.connection import CardResources
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.driver import calls, fleet, loop
from gaudi_batch.driver.loop import Driver
from gaudi_batch.driver.places import CardsOfRun, Places
from gaudi_batch.driver.slot import Slot
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.events import CardDied, CardLoaded, CardPlaced, LoadedCard
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules


class Recorder:
    """Takes the place of what a driver speaks to, and keeps what it hears."""

    def __init__(self) -> None:
        self.progress: Any = lambda *_: []
        self.note: Any = self.progress
        self.show: Any = self.progress
        self.due: Any = self.progress
        self.limit_reached: Any = lambda *_: None
        self.storage = SimpleNamespace(longest_running_s=lambda: 0.0)
        self.ledger = self
        this: Any = self
        self.timeline = Timeline(this, "a")


async def a_driver(cluster_s: float = 60.0) -> Driver:
    """A driver whose cluster never gives a card."""
    config = JobConfig(prompts="p", output="o", device="simulated", limits={"cluster": cluster_s})
    setup: Any = SimpleNamespace(
        driver="a", run_id="", storage=SimpleNamespace(url="o"), job=SimpleNamespace(config=config)
    )
    schedule = Schedule(
        [Shard(0, 0, 0, 4, Bucket(64, 64, 20, 2.0), 4, 4)], "a", RowCounts(4), Rules(cluster_timeout_s=cluster_s)
    )
    recorder: Any = Recorder()
    resources = CardResources("HPU", 1)
    cards = CardsOfRun(setup, resources, Places(setup, resources))
    return Driver(cards, schedule, recorder, recorder, recorder, recorder)


def test_a_driver_that_is_stopped_ends_when_its_grace_is_over() -> None:
    async def stopped() -> None:
        driver = await a_driver()
        for event in (CardPlaced(0, "A"), CardLoaded(0, LoadedCard("card", "A", "host", None, {}, "", 1), 0.0)):
            driver.events.handle(event)
        driver.stop("interrupted", 0.05)
        assert not driver._over.done(), "a shard is in flight"
        assert await driver._over == "interrupted"

    asyncio.run(asyncio.wait_for(stopped(), 30))


def test_a_driver_that_stood_still_does_not_take_its_cards_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that was stopped by a signal, or whose machine slept."""
    monkeypatch.setattr(loop, "LIMITS_INTERVAL_S", 0.1)
    silent: list[float] = []

    def limit(status: Any, since_seen: float, *_: Any) -> None:
        silent.append(since_seen)

    monkeypatch.setattr(fleet, "passed_limit", limit)
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], time=time.time)
    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(fleet, "time", clock)

    async def stood_still() -> None:
        driver = await a_driver()
        slot = driver.fleet.slots[0] = Slot(0, actor=object(), last_seen=time.monotonic())
        enforcing = asyncio.create_task(driver._enforce_limits())
        await asyncio.sleep(0)
        ahead[0] = 1000.0
        before = len(silent)
        while len(silent) == before:
            await asyncio.sleep(0.01)
        assert max(silent) < 900
        slot.last_seen -= 100.0
        before = len(silent)
        while len(silent) == before:
            await asyncio.sleep(0.01)
        enforcing.cancel()

    asyncio.run(asyncio.wait_for(stood_still(), 30))
    assert silent[-1] > 90, "one that is silent is still seen to be"


def test_a_start_that_ray_fails_is_that_card_s_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def begun() -> list[Any]:
        def fails(*_: Any) -> None:
            raise RaySystemError("no such service")

        driver = await a_driver()
        told: list[Any] = []
        driver.fleet._tell = told.append
        monkeypatch.setattr(driver.fleet, "_progress", SimpleNamespace(fault=lambda *_: None))
        monkeypatch.setattr(driver.fleet._places, "start", fails)
        monkeypatch.setattr(fleet, "node_is_gone", lambda *_: False)
        monkeypatch.setattr(calls, "DEPARTURE_TIMEOUT_S", 0.0)
        slot = driver.fleet.slots[0] = Slot(0)
        await driver.fleet.begin(slot)
        assert slot.starting is None
        return told

    assert asyncio.run(begun()) == [CardDied(0, "no such service")]


def test_a_ray_that_does_not_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LIMITS_INTERVAL_S", 0.01)
    held = threading.Event()

    async def asked() -> None:
        driver = await a_driver(cluster_s=0.2)
        answer = driver._background.ask_ray(held.wait)
        enforcing = asyncio.create_task(driver._enforce_limits())
        assert await driver._over == "Ray has not answered for 0.2 s (limits.cluster)"
        held.set()
        await answer
        enforcing.cancel()

    asyncio.run(asyncio.wait_for(asked(), 30))
