"""How fast a run goes, how long it will take, and how sure that is.

The rate of the time to come is that of the time that has been, for each card that is ready, times the cards that are
ready now. To say what comes in the next hour, the last hour is looked at; it is cut into windows, and their rates vary.
The range is the one in which the end lies nine times in ten if the rest varies like these windows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from itertools import pairwise
from statistics import fmean, stdev
from typing import NamedTuple

RATE_WINDOW_S = 60.0
"""Seconds over which the rate is taken, at least."""
MIN_BATCHES = 3
MIN_RATE_S = 2.0
"""Seconds before which there is no rate: that of a moment says nothing."""
MAX_HISTORY_S = 3600.0
"""Seconds that are looked back at most."""
MIN_HISTORY_S = 60.0
"""Seconds without which there is no range."""
MIN_BACK_S = 300.0
"""Seconds that are looked back at least, as far as there are so many: a batch may take 20 s."""
SAMPLE_INTERVAL_S = 2.0
"""Seconds between two samples that are kept, so that an hour takes little memory."""
WINDOWS = {12: 1.80, 4: 2.35}
"""Into how many windows that time is cut, with the 0.95 quantile of Student's t for each, so that one time in twenty
lies beyond each end of the range. Short windows alone would not see a rate that drifts."""


class Sample(NamedTuple):
    """What was so at a moment."""

    time: float
    """Seconds, monotonic."""
    images: int
    card_s: float
    """Seconds of all cards together for which they were ready."""


class TimeLeft(NamedTuple):
    """Seconds until a run is over."""

    seconds: float | None
    """What is expected; None if that can't be said."""
    low: float | None = None
    """The range; None if too little is known of it."""
    high: float | None = None


class Rate:
    """The rate of a run."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self._last: Sample | None = None
        self._cards = 0

    def note(self, now: float, images: int, cards: int) -> None:
        """Notes what is so now.

        Args:
            now: seconds, monotonic.
            images: images that the cards have made so far, those included that a fault has cost: never fewer than
                before.
            cards: how many cards are ready.
        """
        last = self._last
        card_s = 0.0 if last is None else last.card_s + (now - last.time) * self._cards
        began = bool(self._samples) or (last is not None and images > last.images)
        self._last, self._cards = Sample(now, images, card_s), cards
        if began and (not self._samples or now - self._samples[-1].time >= SAMPLE_INTERVAL_S):
            self._samples.append(self._last)
        while len(self._samples) > 1 and now - self._samples[1].time >= MAX_HISTORY_S:
            self._samples.popleft()

    def images_per_s(self) -> float | None:
        """Images a second over the last `RATE_WINDOW_S`, or the last `MIN_BATCHES` times that there were more, if these
        took longer; None until it is known.

        It is taken from one time that there were more to another: a card whose batch takes a minute and a half shows
        nothing between two, and is no faster after one.
        """
        last = self._last
        if last is None:
            return None
        more: list[Sample] = []  # each the first with its images, the last one first
        for sample, before in pairwise(reversed([*self._samples, last])):
            if sample.images > before.images:
                more.append(sample)
            if len(more) > MIN_BATCHES and last.time - sample.time >= RATE_WINDOW_S:
                break
        if len(more) < 2:
            first = self._samples[0] if self._samples else last
            seconds, images = last.time - first.time, last.images - first.images
            return images / seconds if seconds > MIN_RATE_S and images > 0 else None
        newest, oldest = more[0], more[-1]
        usual_s = (newest.time - oldest.time) / (len(more) - 1)
        seconds = max(newest.time, last.time - usual_s) - oldest.time  # a pause that is longer than usual counts
        return (newest.images - oldest.images) / seconds if seconds > MIN_RATE_S else None

    def left(self, images: int) -> TimeLeft:
        """How long so many images will take."""
        rate = self.images_per_s()
        if images <= 0:
            return TimeLeft(0.0, 0.0, 0.0)
        if rate is None or self._last is None or not self._cards:
            return TimeLeft(None)
        history_s = min(self._last.time - self._samples[0].time, MAX_HISTORY_S)
        if history_s < MIN_HISTORY_S:
            return TimeLeft(images / rate)
        back_s = min(history_s, max(MIN_BACK_S, images / rate))
        rates = {count: self._rates(back_s, count) for count in WINDOWS}
        mean = fmean(rates[min(WINDOWS)])
        if mean <= 0:
            return TimeLeft(images / rate)
        seconds = images / mean
        # The mean of the past windows is not that of those to come: both vary.
        spread = max(
            quantile * stdev(rates[count]) * math.sqrt(1 / count + 1 / min(count, max(1.0, count * seconds / back_s)))
            for count, quantile in WINDOWS.items()
        )
        if spread >= mean:
            return TimeLeft(seconds)
        return TimeLeft(seconds, images / (mean + spread), images / (mean - spread))

    def _rates(self, seconds: float, count: int) -> list[float]:
        """The rates in the windows of the last seconds, with as many cards as are ready now."""
        assert self._last is not None
        samples = [*self._samples, self._last]
        times = [sample.time for sample in samples]
        begins = [self._last.time - seconds * window / count for window in range(count, 0, -1)]
        edges = [*(samples[bisect_left(times, begin)] for begin in begins), self._last]
        rates = []
        for first, last in pairwise(edges):
            card_s = last.card_s - first.card_s
            rates.append((last.images - first.images) / card_s * self._cards if card_s > 0 else 0.0)
        return rates
