"""Images a second over the time of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gaudi_batch.reporting.report.batches import Batch
from gaudi_batch.reporting.report.timelines import RunClock

MAX_BINS = 120
"""Moments of a run for which a rate is drawn."""
MIN_BIN_S = 0.5
MAX_CELLS = 12_000
"""Rates of cards that are drawn: with many cards there are fewer moments."""


@dataclass(frozen=True)
class Rates:
    """Images a second in each of some equal parts of a run."""

    bin_s: float
    """Seconds of a part."""
    cards: dict[str, npt.NDArray[np.float64]]
    """Of each card, shape (parts,). An image counts while its batch is generated."""

    def all(self) -> npt.NDArray[np.float64]:
        """Of all cards together, shape (parts,)."""
        return np.sum([*self.cards.values()], axis=0) if self.cards else np.zeros(0)


def rates(batches: Sequence[Batch], clock: RunClock) -> Rates:
    """The rates of a run.

    Args:
        batches: what was committed.
        clock: of the run.
    """
    names = sorted({batch.card for batch in batches})
    most = max(12, min(MAX_BINS, MAX_CELLS // max(1, len(names))))
    count = int(max(1, min(most, clock.wall_s / MIN_BIN_S)))
    bin_s = max(clock.wall_s / count, 1e-9)
    cards = {name: np.zeros(count) for name in names}
    for batch in batches:
        start, stop = clock.at(batch.start) / bin_s, clock.at(batch.stop) / bin_s
        images = cards[batch.card]
        first, last = min(int(start), count - 1), min(int(stop), count - 1)
        if first == last or stop <= start:
            images[first] += batch.images
            continue
        per_bin = batch.images / (stop - start)
        images[first] += per_bin * (first + 1 - start)
        images[first + 1 : last] += per_bin
        images[last] += per_bin * (stop - last)
    return Rates(bin_s, {name: images / bin_s for name, images in cards.items()})
