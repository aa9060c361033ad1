"""Measures how fast the available cards are with a model: latency and throughput of pipeline calls, one card and all at
once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from gaudi_batch.cluster.connection import card_options, card_resources, cluster_capacity, connected
from gaudi_batch.cluster.placement import card_placement
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError, RunStopped
from gaudi_batch.job import Job
from gaudi_batch.pipelines import load_pipeline
from gaudi_batch.pipelines.base import Item, Pipeline
from gaudi_batch.pipelines.sources import ModelInfo
from gaudi_batch.plan import Bucket
from gaudi_batch.text import describe_error

PROMPT = "An astronaut riding a horse on the moon, oil painting"
PUBLISHED = {"first-generation Gaudi": (4.29, 0.283), "Gaudi2": (1.54, 0.904)}
"""Seconds for a batch of 1 and images a second in batches of 8: Stable Diffusion 1.5 at 512 x 512, mixed precision
bf16/fp32 with the config Habana/stable-diffusion, from the page "Habana Gaudi" of the documentation of diffusers."""
PUBLISHED_CLASS, PUBLISHED_SIDE = "StableDiffusionPipeline", 512
PUBLISHED_BATCHES = (1, 8)


@dataclass(frozen=True)
class Rate:
    """Seconds of several calls with one batch size."""

    batch_size: int
    seconds: tuple[float, ...]

    @property
    def latency(self) -> float:
        """Seconds of a call, the median."""
        return statistics.median(self.seconds)

    @property
    def images_per_s(self) -> float:
        """Images a second at the median."""
        return self.batch_size / self.latency


@dataclass(frozen=True)
class Bench:
    """The result of a benchmark."""

    job: Job
    device: str
    """The device, as the card names it."""
    warmup_calls: int
    latency: Rate
    """Of one card, in batches of 1."""
    throughput: Rate
    """Of one card, in batches of the job's size."""
    together: tuple[Rate, ...]
    """Of each card while all of them work, in batches of the job's size."""

    @property
    def emulated(self) -> bool:
        """Whether the device was emulated."""
        return "emulated" in self.device

    @property
    def together_images_per_s(self) -> float:
        """Images a second of all cards at once."""
        return sum(rate.images_per_s for rate in self.together)

    @property
    def scaling(self) -> float:
        """Throughput of all cards at once, as a share of one card's times their number."""
        return self.together_images_per_s / (len(self.together) * self.throughput.images_per_s)

    def describe(self) -> dict[str, Any]:
        """The figures as JSON."""
        bucket = self.job.rules.bucket
        return {
            "emulated": self.emulated,
            "device": self.device,
            "model": self.job.model.name,
            **bucket._asdict(),
            "dtype": self.job.dtype,
            "batch_size": self.throughput.batch_size,
            "warmup_calls": self.warmup_calls,
            "latency_s": list(self.latency.seconds),
            "throughput_s": list(self.throughput.seconds),
            "cards": len(self.together),
            "together_s": [list(rate.seconds) for rate in self.together],
            "images_per_s": self.throughput.images_per_s,
            "together_images_per_s": self.together_images_per_s,
            "scaling": self.scaling,
        }

    def table(self) -> str:
        """The figures as a table."""
        job, bucket, batch = self.job, self.job.rules.bucket, self.throughput.batch_size
        slow, fast = max(self.throughput.seconds), min(self.throughput.seconds)
        rows = [
            ("", "latency (batch size 1)", f"throughput (batch size {batch})"),
            ("---", "---", "---"),
            (
                "one card",
                f"{self.latency.latency:.3g} s ({min(self.latency.seconds):.3g} to {max(self.latency.seconds):.3g})",
                f"{self.throughput.images_per_s:.3g} images/s ({batch / slow:.3g} to {batch / fast:.3g})",
            ),
        ]
        if len(self.together) > 1:
            share = f"{self.scaling:.1%} of {len(self.together)} times one card"
            rows.append(
                (f"{len(self.together)} cards at once", "", f"{self.together_images_per_s:.3g} images/s, {share}")
            )
        if self._compares():
            for name, (latency, rate) in PUBLISHED.items():
                rows.append((f"published, {name}", f"{latency} s", f"{rate} images/s"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        head = f"{job.model.name}: {bucket}, {job.dtype}, on {self.device}"
        tail = (
            f"medians of {len(self.throughput.seconds)} calls after {self.warmup_calls} for warm-up;"
            " in brackets the slowest and the fastest"
        )
        first = ["EMULATED CARDS: a CPU computed this, and the figures say nothing of a Gaudi"] if self.emulated else []
        return "\n".join([*first, head, "", *lines, "", tail])

    def _compares(self) -> bool:
        bucket = self.job.rules.bucket
        return (
            self.job.config.device == "hpu"
            and not self.emulated
            and self.job.model.pipeline_class == PUBLISHED_CLASS
            and not self.job.model.name.startswith("builtin:")
            and (bucket.steps, bucket.graph_key.guided, self.job.dtype) == (50, True, "autocast to bfloat16")
            and (bucket.width, bucket.height) == (PUBLISHED_SIDE, PUBLISHED_SIDE)
            and (1, self.throughput.batch_size) == PUBLISHED_BATCHES
        )


class _BenchCard:
    """The actor: one card that makes the same images again and again."""

    def __init__(self, config: JobConfig, model: ModelInfo, threads: int | None) -> None:
        self._job = config, model, threads
        self._pipeline: Pipeline

    def load(self) -> tuple[str, int]:
        """Loads the pipeline; returns the device's name and the calls that a new shape needs for warm-up."""
        module = card_placement(self._job[0].device)[2]
        self._pipeline = load_pipeline(*self._job, module)
        return self._pipeline.device, self._pipeline.warmup_batches

    def call(self, bucket: Bucket, batch_size: int, calls: int) -> list[float]:
        """Seconds of each of some calls."""
        items = [Item(number, 0, PROMPT, "", number) for number in range(batch_size)]
        durations = []
        for _ in range(calls):
            started = time.perf_counter()
            self._pipeline.generate(bucket, items)
            durations.append(time.perf_counter() - started)
        return durations


def bench(job: Job, address: str | None, calls: int) -> Bench:
    """Measures a job's model, shape and batch size on the cards at hand.

    Args:
        job: the job; its prompts and its output are not used.
        address: a Ray cluster, or None for this machine.
        calls: timed calls for each figure.

    Raises:
        InputError: there is no card.
        RunStopped: a card failed.
    """
    with connected(job, address):
        resources = card_resources(job)
        cards = cluster_capacity(job.config, resources).cards
        if not cards:
            raise InputError(f"the cluster has no card for this job, which needs {resources.amount} {resources.name}")
        free = int(ray.available_resources().get(resources.name, 0) // resources.amount)
        if free < cards:
            raise InputError(f"{cards} cards are to be measured and {free} are free; wait for others, or lower --cards")
        options = card_options(job.config, resources)
        actors = [
            ray.remote(_BenchCard).options(**options).remote(job.config, job.model, job.threads) for _ in range(cards)
        ]
        try:
            return _measure(job, actors, calls)
        except GetTimeoutError:
            limits = job.config.limits
            raise RunStopped(
                f"a card did not answer within its limit (limits.loading {limits.loading:g} s, limits.first_batch"
                f" {limits.first_batch:g} s a call)"
            ) from None
        except (RayTaskError, RayActorError) as error:
            cause = getattr(error, "cause", None) or error
            raise RunStopped(f"a card failed: {describe_error(cause)}") from None
        finally:
            for actor in actors:
                ray.kill(actor)


def _measure(job: Job, actors: Sequence[Any], calls: int) -> Bench:
    bucket, batch_size = job.rules.bucket, job.config.batch_size
    limits = job.config.limits
    loaded = [actor.load.remote() for actor in actors]
    device, warmup = ray.get(loaded, timeout=limits.loading)[0]

    def seconds(cards: Sequence[Any], size: int, count: int) -> list[list[float]]:
        called = [card.call.remote(bucket, size, count) for card in cards]
        return ray.get(called, timeout=limits.first_batch * count)  # type: ignore[no-any-return]

    def rate(actor: Any, size: int) -> Rate:
        seconds([actor], size, warmup)
        return Rate(size, tuple(seconds([actor], size, calls)[0]))

    latency, throughput = rate(actors[0], 1), rate(actors[0], batch_size)
    together: tuple[Rate, ...] = (throughput,)
    if len(actors) > 1:
        seconds(actors[1:], batch_size, warmup)
        together = tuple(Rate(batch_size, tuple(rates)) for rates in seconds(actors, batch_size, calls))
    return Bench(job, device, warmup, latency, throughput, together)
