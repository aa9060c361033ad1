"""Measures how fast the available cards are with a model: latency and throughput of pipeline calls, one card and all at
once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gaudi_batch.bench.card import MeasuredCards, measured_cards
from gaudi_batch.bench.published import PUBLISHED, Published
from gaudi_batch.bench.rate import Rate, caveat, table
from gaudi_batch.job import Job


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
        for published in self._published():
            for device, rate in published.rates.items():
                latency = f"{published.latencies[device]} s" if device in published.latencies else ""
                rows.append((f"{published.source}, {device}", latency, f"{rate} images/s"))
        head = f"{job.model.name}: {bucket}, {job.dtype}, on {self.device}"
        tail = (
            f"medians of {len(self.throughput.seconds)} calls after {self.warmup_calls} for warm-up;"
            " in brackets the slowest and the fastest"
        )
        return "\n".join([*caveat(self.device), head, "", *table(rows), "", tail])

    def _published(self) -> list[Published]:
        """What was published of a real card with the same settings."""
        job = self.job
        if job.config.device != "hpu" or self.emulated or job.model.name.startswith("builtin:"):
            return []
        return [each for each in PUBLISHED if each.is_of(job, self.throughput.batch_size)]


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
    with measured_cards(job, address) as cards:
        return _measure(job, cards, calls)


def _measure(job: Job, cards: MeasuredCards, calls: int) -> Bench:
    device, warmup = cards.load()
    latency, throughput = (cards.rate(size, warmup, calls) for size in (1, job.config.batch_size))
    together = cards.rates_together(job.config.batch_size, warmup, calls) if cards.count > 1 else (throughput,)
    return Bench(job, device, warmup, latency, throughput, together)
