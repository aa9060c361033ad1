"""Cards that are measured: their actors, calls with time limits, and how a call fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from gaudi_batch.bench.rate import Rate
from gaudi_batch.cluster.connection import card_options, card_resources, cluster_capacity, connected
from gaudi_batch.cluster.placement import card_placement, why_died
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError, RunStopped
from gaudi_batch.job import Job
from gaudi_batch.pipelines import load_pipeline
from gaudi_batch.pipelines.base import DeviceMemory, Item, OutOfDeviceMemory, Pipeline
from gaudi_batch.pipelines.sources import ModelInfo
from gaudi_batch.plan import Bucket
from gaudi_batch.text import describe_error

PROMPT = "An astronaut riding a horse on the moon, oil painting"


class CardFailed(RunStopped):
    """A card that is measured failed."""

    def __init__(self, message: str, *, out_of_memory: bool = False, passed_limit: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory
        """Whether the device had no memory left."""
        self.passed_limit = passed_limit
        """Whether it did not answer within its time limit."""


class Loaded(NamedTuple):
    """What a card says of itself once it has loaded the model."""

    device: str
    """The device, as the card names it."""
    warmup_calls: int
    """Calls that a new shape needs for warm-up."""


class _Actor:
    """The process of a card, which makes the same images again and again."""

    def __init__(self, config: JobConfig, model: ModelInfo, threads: int | None) -> None:
        self._job = config, model, threads
        self._pipeline: Pipeline

    def load(self) -> Loaded:
        module = card_placement(self._job[0].device)[2]
        self._pipeline = load_pipeline(*self._job, module)
        return Loaded(self._pipeline.device, self._pipeline.warmup_batches)

    def call(self, bucket: Bucket, batch_size: int, calls: int) -> list[float]:
        items = [Item(number, 0, PROMPT, "", number) for number in range(batch_size)]
        durations = []
        for _ in range(calls):
            started = time.perf_counter()
            self._pipeline.generate(bucket, items)
            durations.append(time.perf_counter() - started)
        return durations

    def clear(self, bucket: Bucket) -> None:
        self._pipeline.forget(self._pipeline.graph_key(bucket, Item(0, 0, PROMPT, "", 0)))
        self._pipeline.take_memory_peak()

    def memory(self) -> DeviceMemory | None:
        return self._pipeline.take_memory_peak()


class MeasuredCards:
    """Cards of the connected cluster, each held by an actor of its own.

    Args:
        job: the job; its prompts and its output are not used.
        count: how many cards.
    """

    def __init__(self, job: Job, count: int) -> None:
        self._job = job
        self.count = count
        self._actors: list[Any] = []

    def load(self) -> Loaded:
        """Starts a new process for each card, in place of the one that it has, and loads the model in all of them.

        Returns:
            What the first card says of itself.

        Raises:
            CardFailed: one can't load it.
        """
        self.kill()
        job, options = self._job, card_options(self._job.config, card_resources(self._job))
        start = ray.remote(_Actor).options(**options).remote
        self._actors = [start(job.config, job.model, job.threads) for _ in range(self.count)]
        loaded = self._ask(lambda actor: actor.load.remote(), self._actors, job.config.limits.loading)
        return loaded[0]  # type: ignore[no-any-return]

    def rate(self, batch_size: int, warmup_calls: int, calls: int) -> Rate:
        """Measures the first card alone. What other batch sizes have left in the device's memory is given up before.

        Args:
            batch_size: images of a call.
            warmup_calls: calls before those that are timed; 0 for the size that was measured last, which is warm.
            calls: timed calls.

        Raises:
            CardFailed: it failed; its process is then of no further use.
        """
        first, limit = self._actors[:1], self._job.config.limits.first_batch
        if warmup_calls:
            self._ask(lambda actor: actor.clear.remote(self._job.rules.bucket), first, limit)
            self._call(first, batch_size, warmup_calls)
        seconds = self._call(first, batch_size, calls)[0]
        (memory,) = self._ask(lambda actor: actor.memory.remote(), first, limit)
        return Rate(batch_size, seconds, memory)

    def rates_together(self, batch_size: int, warmup_calls: int, calls: int) -> tuple[Rate, ...]:
        """Measures all cards at once, of which the first is warm already. Raises CardFailed."""
        self._call(self._actors[1:], batch_size, warmup_calls)
        return tuple(Rate(batch_size, seconds) for seconds in self._call(self._actors, batch_size, calls))

    def kill(self) -> None:
        """Ends the processes."""
        while self._actors:
            ray.kill(self._actors.pop())

    def _call(self, actors: Sequence[Any], batch_size: int, calls: int) -> list[tuple[float, ...]]:
        bucket, limit = self._job.rules.bucket, self._job.config.limits.first_batch * calls
        answers = self._ask(lambda actor: actor.call.remote(bucket, batch_size, calls), actors, limit)
        return [tuple(seconds) for seconds in answers]

    def _ask(self, method: Callable[[Any], Any], actors: Sequence[Any], limit: float) -> list[Any]:
        try:
            return ray.get([method(actor) for actor in actors], timeout=limit)  # type: ignore[no-any-return]
        except GetTimeoutError:
            limits = self._job.config.limits
            raise CardFailed(
                f"a card did not answer within its limit (limits.loading {limits.loading:g} s, limits.first_batch"
                f" {limits.first_batch:g} s a call)",
                passed_limit=True,
            ) from None
        except RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            out_of_memory = isinstance(cause, OutOfDeviceMemory)
            raise CardFailed(f"a card failed: {describe_error(cause)}", out_of_memory=out_of_memory) from None
        except RayActorError as error:
            raise CardFailed(f"a card's process died: {why_died(error)}") from None
        except RayError as error:  # as when Ray's monitor ends a process that takes too much of the host's memory
            raise CardFailed(f"a card failed: {describe_error(error)}") from None


@contextlib.contextmanager
def measured_cards(job: Job, address: str | None, count: int | None = None) -> Iterator[MeasuredCards]:
    """Connects to the cluster and takes cards of it for the time being.

    Args:
        job: the job; its prompts and its output are not used.
        address: a Ray cluster, or None for this machine.
        count: how many cards; None for all that the job may have.

    Raises:
        InputError: there are not so many, or others have them.
    """
    with connected(job, address):
        resources = card_resources(job)
        wanted = cluster_capacity(job.config, resources).cards if count is None else count
        if not wanted or not cluster_capacity(job.config, resources).total_cards:
            raise InputError(f"the cluster has no card for this job, which needs {resources.amount} {resources.name}")
        free = int(ray.available_resources().get(resources.name, 0) // resources.amount)
        if free < wanted:
            fewer = ", or lower --cards" if count is None else ""
            raise InputError(f"{wanted} cards are to be measured and {free} are free; wait for others{fewer}")
        cards = MeasuredCards(job, wanted)
        try:
            yield cards
        finally:
            cards.kill()
