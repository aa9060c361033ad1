"""The search for a batch size. Pure: what measures is an argument.

The size is doubled until the device has no memory left, or until a doubling gains too little. One that does is measured
a second time, and the faster time counts: whatever disturbs a measurement makes it slower. The choice is the smallest
size that is about as fast as the fastest: a larger one would take more memory, and fill up more of a short batch, for
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gaudi_batch.bench.rate import Rate

MIN_GAIN = 0.05
"""Images a second that a doubling must bring, as a share of those before, for the search to go on."""
NEAR_BEST = 0.03
"""The share by which a size may be slower than the fastest and still be chosen."""


@dataclass(frozen=True)
class Failure:
    """A batch size that a card could not make."""

    reason: str
    """In words, without the batch size."""
    out_of_memory: bool = False
    """Whether the device had no memory left."""


@dataclass(frozen=True)
class Stop:
    """Why the search ended."""

    kind: Literal["memory", "failure", "gain", "largest"]
    """The device's memory, another failure, too little gain, or the largest size that is allowed."""
    batch_size: int
    """The size at which it ended."""
    text: str
    """In words."""


@dataclass(frozen=True)
class Search:
    """The result of a search."""

    rates: tuple[Rate, ...]
    """Of each size that could be made, in order; at least one."""
    stop: Stop

    @property
    def best(self) -> Rate:
        """The fastest."""
        return max(self.rates, key=lambda rate: rate.images_per_s)

    @property
    def chosen(self) -> Rate:
        """The smallest size whose rate is at most `NEAR_BEST` below the best."""
        enough = (1 - NEAR_BEST) * self.best.images_per_s
        return next(rate for rate in self.rates if rate.images_per_s >= enough)


def search(first: Rate, measure: Callable[[int], Rate | Failure], largest: int) -> Search:
    """Doubles the batch size until something ends the search.

    Args:
        first: of the first size.
        measure: measures a batch size; asked for the last one again, it measures that a second time.
        largest: the largest size to try.
    """
    rates = [first]
    while (stop := _stop(rates, largest)) is None:
        batch_size = 2 * rates[-1].batch_size
        outcome = measure(batch_size)
        if isinstance(outcome, Failure):
            stop = _stop_of_failure(batch_size, outcome)
            break
        rates.append(outcome)
        if _gain(rates) < MIN_GAIN:
            again = measure(batch_size)
            if isinstance(again, Rate):
                rates[-1] = min(outcome, again, key=lambda rate: rate.latency)
    return Search(tuple(rates), stop)


def _gain(rates: Sequence[Rate]) -> float:
    """Images a second that the last doubling has brought, as a share of those before."""
    return rates[-1].images_per_s / rates[-2].images_per_s - 1


def _stop(rates: Sequence[Rate], largest: int) -> Stop | None:
    last = rates[-1]
    if len(rates) > 1 and (gain := _gain(rates)) < MIN_GAIN:
        change = f"{gain:.1%} more" if gain >= 0 else f"{-gain:.1%} fewer"
        text = (
            f"batch size {last.batch_size} brings {change} images/s than {rates[-2].batch_size}; less than"
            f" {MIN_GAIN:.0%} more ends the search"
        )
        return Stop("gain", last.batch_size, text)
    if 2 * last.batch_size > largest:
        return Stop("largest", last.batch_size, f"--max-batch-size {largest} allows no batch size over it")
    return None


def _stop_of_failure(batch_size: int, failure: Failure) -> Stop:
    if failure.out_of_memory:
        return Stop("memory", batch_size, f"the device has no memory for batch size {batch_size}")
    return Stop("failure", batch_size, f"batch size {batch_size} fails: {failure.reason}")
