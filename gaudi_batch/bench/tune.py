"""Finds the batch size for a model on a card: doubles it until the device's memory ends or nothing is gained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from gaudi_batch.bench.card import CardFailed, Loaded, MeasuredCards, measured_cards
from gaudi_batch.bench.rate import Rate, caveat, table
from gaudi_batch.bench.record import Measurement
from gaudi_batch.bench.search import NEAR_BEST, Failure, Search, search
from gaudi_batch.job import Job

log = logging.getLogger(__name__)

GIB = 1024**3


@dataclass(frozen=True)
class Tuned:
    """The result of `tune`."""

    job: Job
    card: Loaded
    search: Search
    time: str
    """When it was measured, ISO 8601, UTC."""

    @property
    def measurements(self) -> list[Measurement]:
        """As the record has them."""
        return [Measurement.of(self.job, self.card.device, self.time, rate) for rate in self.search.rates]

    def describe(self) -> dict[str, Any]:
        """The figures as JSON."""
        search = self.search
        return {
            "emulated": "emulated" in self.card.device,
            "simulated": self.card.device == "simulated",
            "device": self.card.device,
            "model": self.job.model.name,
            "revision": self.job.model.revision,
            **self.job.rules.bucket._asdict(),
            "dtype": self.job.dtype,
            "warmup_calls": self.card.warmup_calls,
            "sizes": [
                {
                    "batch_size": rate.batch_size,
                    "images_per_s": rate.images_per_s,
                    "latency_s": rate.latency,
                    "seconds": list(rate.seconds),
                    "memory_peak_bytes": rate.memory and rate.memory.peak,
                    "memory_bytes": rate.memory and rate.memory.total,
                }
                for rate in search.rates
            ],
            "stopped": {"kind": search.stop.kind, "batch_size": search.stop.batch_size, "text": search.stop.text},
            "batch_size": search.chosen.batch_size,
        }

    def table(self) -> str:
        """The figures as a table, with the choice and its reason."""
        rates, best, chosen = self.search.rates, self.search.best, self.search.chosen
        tells = any(rate.memory for rate in rates)
        head = ("batch size", "images/s", "seconds a batch", *(["device memory"] if tells else []))
        lines = [head, *(_row(rate, tells) for rate in rates)]
        why = (
            "the fastest"
            if chosen is best
            else f"the smallest within {NEAR_BEST:.0%} of the fastest, {best.batch_size}"
        )
        return "\n".join(
            [
                *caveat(self.card.device),
                f"{self.job.model.name}: {self.job.rules.bucket}, {self.job.dtype}, on {self.card.device}",
                "",
                *table(lines),
                "",
                f"medians of {len(chosen.seconds)} calls after {self.card.warmup_calls} for warm-up; in brackets the"
                " fastest and the slowest",
                f"stopped: {self.search.stop.text}",
                f"chosen: batch size {chosen.batch_size}, {why}",
            ]
        )


def _row(rate: Rate, tells: bool) -> tuple[str, ...]:
    row = (
        str(rate.batch_size),
        f"{rate.images_per_s:.3g}",
        f"{rate.latency:.3g} ({min(rate.seconds):.3g} to {max(rate.seconds):.3g})",
    )
    if not tells:
        return row
    memory = rate.memory
    return (*row, "-" if memory is None else f"{memory.peak / GIB:.3g} of {memory.total / GIB:.3g} GiB")


def tune(job: Job, address: str | None, calls: int, largest: int) -> Tuned:
    """Measures batch sizes 1, 2, 4, ... of a job's model and shape on one card.

    Args:
        job: the job; its prompts, its output and its batch size are not used.
        address: a Ray cluster, or None for this machine.
        calls: timed calls of each size.
        largest: the largest batch size to try.

    Raises:
        InputError: there is no card.
        CardFailed: the model can't be loaded, or not even a batch of 1 can be made.
    """
    with measured_cards(job, address, count=1) as cards:
        log.info("loading %s", job.model.name)
        trial = _Trial(cards, calls)
        result = search(trial.first(), trial.measure, largest)
        return Tuned(job, trial.card, result, datetime.now(timezone.utc).isoformat(timespec="seconds"))


class _Trial:
    """Measures batch sizes on a card whose process is replaced when a size has failed in it."""

    def __init__(self, cards: MeasuredCards, calls: int) -> None:
        self._cards = cards
        self._calls = calls
        self._warm: int | None = None
        """The size that the process has measured last."""
        self.card = cards.load()

    def first(self) -> Rate:
        return self._rate(1)

    def measure(self, batch_size: int) -> Rate | Failure:
        """Measures a size. One that fails is tried once more in a new process, as a run's card would make it: what
        smaller sizes have left in the device's memory may be to blame, and a device fails for other reasons, too."""
        try:
            return self._rate(batch_size)
        except CardFailed as error:
            if error.passed_limit:
                return Failure(str(error))
            log.info("batch size %d: %s; once more in a new process", batch_size, error)
        try:
            device = self._cards.load().device
            if device != self.card.device:
                return Failure(f"the card that took the place of {self.card.device} is {device}")
            return self._rate(batch_size)
        except CardFailed as error:
            return Failure(str(error), error.out_of_memory)

    def _rate(self, batch_size: int) -> Rate:
        warmup_calls = 0 if batch_size == self._warm else self.card.warmup_calls
        self._warm = None
        rate = self._cards.rate(batch_size, warmup_calls, self._calls)
        self._warm = batch_size
        log.info("batch size %d: %.3g images/s%s", batch_size, rate.images_per_s, "" if warmup_calls else ", once more")
        return rate
