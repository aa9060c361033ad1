"""Images a second over the time of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gaudi_batch.layout import driver_of
from gaudi_batch.reporting.report.batches import Batch
from gaudi_batch.reporting.report.timelines import RunClock

MAX_BINS = 120
"""Moments of a run for which a rate is drawn."""
MIN_BIN_S = 0.5
MAX_CELLS = 12_000
"""Rates of cards that are drawn: with many cards there are fewer moments of each."""


@dataclass(frozen=True)
class Rates:
    """Images a second in each of some equal parts of a run."""

    bin_s: float
    """Seconds of a part."""
    values: Mapping[str, npt.NDArray[np.float64]]
    """By name, shape (parts,). An image counts while its batch is generated."""


def rates_by_card(batches: Sequence[Batch], clock: RunClock) -> Rates:
    """The rate of each card; with many cards in fewer parts.

    Args:
        batches: what was committed.
        clock: of the run.
    """
    cards = len({batch.card for batch in batches})
    return _rates(batches, clock, max(12, min(MAX_BINS, MAX_CELLS // max(1, cards))), lambda batch: batch.card)


def rate_of_all(batches: Sequence[Batch], clock: RunClock) -> Rates:
    """The rate of all cards together, by the name ""; arguments as above."""
    return _rates(batches, clock, MAX_BINS, lambda _: "")


def _rates(batches: Sequence[Batch], clock: RunClock, most: int, name_of: Callable[[Batch], str]) -> Rates:
    count = int(max(1, min(most, clock.wall_s / MIN_BIN_S)))
    bin_s = max(clock.wall_s / count, 1e-9)
    values: dict[str, npt.NDArray[np.float64]] = {}
    for batch in batches:
        driver = driver_of(batch.attempt)
        start, stop = clock.at(batch.start, driver) / bin_s, clock.at(batch.stop, driver) / bin_s
        images = values.setdefault(name_of(batch), np.zeros(count))
        first, last = min(int(start), count - 1), min(int(stop), count - 1)
        if first == last or stop <= start:
            images[first] += batch.images
            continue
        per_bin = batch.images / (stop - start)
        images[first] += per_bin * (first + 1 - start)
        images[first + 1 : last] += per_bin
        images[last] += per_bin * (stop - last)
    return Rates(bin_s, {name: images / bin_s for name, images in values.items()})
