"""Cards as threads of the tests' own process, where a test is about records, rows or storage and not about processes.

Ray places them, and `Card`, its mailbox, the driver and all messages are the real ones. Only the process of a card is
not started, which costs more than a small job. What a card is given and what it returns is pickled, as Ray does.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError

from gaudi_batch.card import actor
from gaudi_batch.card.actor import Card
from gaudi_batch.card.messages import CardSetup
from gaudi_batch.driver.places import CARD_CALLS, Places


def _copy(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


class _Call:
    """A method of a card, as Ray's handle of an actor has it."""

    def __init__(self, card: ThreadCard, name: str) -> None:
        self._card = card
        self._name = name

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self._card.threads.submit(self._card.call, self._name, _copy(arguments)))


class ThreadCard:
    """Takes the place of the handle of a card's actor.

    Args:
        setup: what the card gets.
        module: number of its module.
    """

    def __init__(self, setup: CardSetup, module: int) -> None:
        self.threads = ThreadPoolExecutor(CARD_CALLS, "card")
        self.assign, self.recall, self.drop, self.poll = (
            _Call(self, name) for name in ("assign", "recall", "drop", "poll")
        )
        self._killed = threading.Event()
        _placed.module = module
        self._setup = _copy(setup)
        self._card = Card(self._setup)

    def call(self, name: str, arguments: Any) -> Any:
        """Calls a method of the card; a card that is killed meanwhile does not answer."""
        self._raise_if_killed()
        answer = _copy(getattr(self._card, name)(*arguments))
        self._raise_if_killed()
        return answer

    def kill(self) -> None:
        """From now on it answers nothing and writes nothing."""
        self._killed.set()
        self._setup.storage.put = self._refuse
        self.threads.shutdown(wait=False)

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("this card was killed")

    def _raise_if_killed(self) -> None:
        if self._killed.is_set():
            raise RayActorError()


_placed = threading.local()
"""The module of the card that the thread makes."""


def _placement(device: str) -> tuple[str, str, int | None]:
    return ray.get_runtime_context().get_node_id(), socket.gethostname(), _placed.module


def _start(places: Places, number: int) -> ThreadCard:
    if number not in places._actors:
        places.started_at[number] = time.monotonic()
        places._actors[number] = ThreadCard(places._setup, number)
    card: ThreadCard = places._actors[number]
    return card


def _kill(places: Places, number: int) -> None:
    card = places._actors.pop(number, None)
    if card is not None:
        card.kill()


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the runs of this process start no processes for their cards."""
    monkeypatch.setattr(Places, "start", _start)
    monkeypatch.setattr(Places, "kill", _kill)
    monkeypatch.setattr(actor, "card_placement", _placement)
