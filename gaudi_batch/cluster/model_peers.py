"""From where each node of a job gets a model: the first from its origin, the others from cards of nodes that have it.

An actor of the job, the tracker, knows who has what and who fetches from whom. Each that has fetched a model gives it
to others, so their number doubles and more with each round, whatever the hub or the store can give.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from gaudi_batch.pipelines.fetching import Files, LocalModel, Origin, PeerLost
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

READERS = 2
"""Nodes that may fetch from one node at the same time."""
SLOW_S = 600.0
"""Seconds after which a card that still fetches keeps no other from the same source: its network may be slow."""
CHECK_INTERVAL_S = 5.0
"""Seconds for which one waits for its turn until those that have theirs are asked whether they live."""
CHUNK = 16 * 1024**2
"""Bytes of a file that a card is asked for at a time."""
READ_TIMEOUT_S = 120.0
"""Seconds in which a card has to answer."""
CALLS = 4
"""Calls of other nodes that a card answers at the same time, beside the driver's."""
ORIGIN = ""
"""The name of a model's origin among the sources."""
GROUP = "models"
"""Ray's name for these calls."""


class Source(NamedTuple):
    """A card that has a model."""

    name: str
    actor: Any


class _Turn(NamedTuple):
    actor: Any
    began: float


class ModelTracker:
    """Who has which model, and who fetches it; an asynchronous actor, one for a job."""

    def __init__(self) -> None:
        self._holders: dict[str, dict[str, Any]] = defaultdict(dict)  # actors by revision and name
        # By revision and node of the source, and by the reader's name.
        self._readers: dict[tuple[str, str], dict[str, _Turn]] = defaultdict(dict)
        self._changed = asyncio.Event()
        self._checked = time.monotonic()

    async def turn(self, revision: str, origin_readers: int, reader: Source) -> Source | None:
        """Waits until somebody can give a model to a card.

        Args:
            revision: of the model.
            origin_readers: how many may fetch from its origin at the same time.
            reader: the card.

        Returns:
            A card that has it, or None for the origin.
        """
        has_waited = False
        while True:
            for source in self._sources(revision):
                name, room = (ORIGIN, origin_readers) if source is None else (source.name, READERS)
                if self._busy(revision, name) < room:
                    self._readers[revision, _node(name)][reader.name] = _Turn(reader.actor, time.monotonic())
                    if has_waited and not await _lives(reader.actor):
                        await self.end(revision, name, reader.name, lost=False)
                        return None  # to nobody
                    return source
            has_waited = True
            try:
                await asyncio.wait_for(self._changed.wait(), CHECK_INTERVAL_S)
            except asyncio.TimeoutError:
                await self._drop_dead()

    async def end(self, revision: str, source: str, reader: str, lost: bool) -> None:
        """Ends a card's turn; the source counts no longer if it was lost."""
        self._readers[revision, _node(source)].pop(reader, None)
        if lost:
            self._holders[revision].pop(source, None)
        self._notify()

    async def offer(self, revision: str, holder: Source) -> None:
        """Notes that a card has a model."""
        self._holders[revision][holder.name] = holder.actor
        self._notify()

    def _sources(self, revision: str) -> list[Source | None]:
        """Who can give a model, the least busy first; its origin only as long as nobody else can."""
        holders = [Source(name, actor) for name, actor in self._holders[revision].items()]
        return [*sorted(holders, key=lambda holder: self._busy(revision, holder.name))] or [None]

    def _busy(self, revision: str, source: str) -> int:
        """How many fetch a model from a source, without those that have taken too long."""
        now = time.monotonic()
        return sum(now - turn.began < SLOW_S for turn in self._readers[revision, _node(source)].values())

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _drop_dead(self) -> None:
        """Forgets those that died amid their turns."""
        if time.monotonic() < self._checked + CHECK_INTERVAL_S:
            return
        self._checked = time.monotonic()
        turns = [(place, name, turn) for place, readers in self._readers.items() for name, turn in readers.items()]
        lives = await asyncio.gather(*(_lives(turn.actor) for _, _, turn in turns))
        for (place, name, _), is_alive in zip(turns, lives, strict=True):
            if not is_alive:
                self._readers[place].pop(name, None)
                self._notify()


def _node(source: str) -> str:
    """The node of a card, from its name (see `peers_of_card`); the name of what is no card."""
    return source.rpartition("-")[0] or source


async def _lives(actor: Any) -> bool:
    """Whether a card has not died; one that does not answer may live."""
    try:
        await asyncio.wait_for(actor.__ray_ready__.remote(), CHECK_INTERVAL_S)
    except (asyncio.TimeoutError, ActorUnavailableError):
        return True
    except RayError:
        return False
    return True


class ModelPeers:
    """The other nodes of a job, as one of its cards sees them, and this card, as they see it.

    Args:
        tracker: the job's tracker; None where there is none, and each node fetches by itself.
        own: this card.
    """

    def __init__(self, tracker: Any, own: Source) -> None:
        self._tracker = tracker
        self._own = own
        self._models: dict[str, LocalModel] = {}

    @contextlib.contextmanager
    def turn(self, origin: Origin) -> Iterator[_CardPeer | None]:
        """See `Peers`."""
        if self._tracker is None:
            yield None
            return
        try:
            source = ray.get(self._tracker.turn.remote(origin.revision, origin.readers, self._own))
        except RayError as error:
            log.warning("models are not shared between nodes: %s", one_line(error))
            yield None
            return
        lost = False
        try:
            yield None if source is None else _CardPeer(origin.revision, source.actor)
        except PeerLost as error:
            lost = True
            log.warning("a node can't give its model: %s", one_line(error))
            raise
        finally:
            self._tracker.end.remote(origin.revision, source.name if source else ORIGIN, self._own.name, lost)

    def offer(self, revision: str, model: LocalModel) -> None:
        """See `Peers`."""
        self._models[revision] = model
        if self._tracker is not None:
            with contextlib.suppress(RayError):  # who then waits for a turn gets it from its origin
                # An asynchronous actor may take calls out of order, and the turn ends only once others can see this.
                ray.get(self._tracker.offer.remote(revision, self._own), timeout=READ_TIMEOUT_S)

    def files(self, revision: str) -> Files:
        """The files of a model that this card has, for another."""
        return self._models[revision].files

    def read(self, revision: str, path: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes `start` to `stop` of one of them."""
        model = self._models[revision]
        if path not in model.files:
            raise FileNotFoundError(path)
        return np.fromfile(model.directory / path, np.uint8, stop - start, offset=start)


class _CardPeer:
    """A card of another node that has a model."""

    def __init__(self, revision: str, actor: Any) -> None:
        self._revision = revision
        self._actor = actor

    def files(self) -> Files:
        """See `Peer`."""
        files: Files = self._ask("model_files", self._revision)
        return files

    def read(self, path: str, size: int, file: Callable[[bytes], object]) -> None:
        """See `Peer`."""
        for start in range(0, size, CHUNK):
            file(self._ask("read_model", self._revision, path, start, min(start + CHUNK, size)))

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            call = getattr(self._actor, method).options(concurrency_group=GROUP)
            return ray.get(call.remote(*arguments), timeout=READ_TIMEOUT_S)
        except RayError as error:
            raise PeerLost(str(error)) from None


def peers_of_card(tracker: Any, node_id: str) -> ModelPeers:
    """The peers of the card that this actor is."""
    actor = None if tracker is None else ray.get_runtime_context().current_actor
    return ModelPeers(tracker, Source(f"{node_id}-{os.getpid()}", actor))


def start_tracker() -> Any:
    """Starts the tracker of a job, on the driver's node."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 10_000, "scheduling_strategy": node}
    return ray.remote(ModelTracker).options(**options).remote()
