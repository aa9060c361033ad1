"""The driver's clock, as a card knows it. The clocks of nodes differ, and times of different cards are compared."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

POLLS_KEPT = 32
"""About half a minute of polls: so long it takes until a clock that was set is followed."""


class DriverClock:
    """Follows the driver's clock, which each poll brings along.

    A poll is on its way for milliseconds, or longer if a machine is busy, so what it says is late and never early: of
    the last ones the least late counts.

    Args:
        here: this node's clock, in seconds since the epoch.
    """

    def __init__(self, here: Callable[[], float] = time.time) -> None:
        self._here = here
        self._recent: deque[float] = deque(maxlen=POLLS_KEPT)
        self._ahead_s = 0.0

    def hear(self, now: float) -> None:
        """The driver's clock stands at `now`, in seconds since the epoch."""
        self._recent.append(now - self._here())
        self._ahead_s = max(self._recent)  # other threads read it

    def convert(self, moment: float) -> float:
        """What the driver's clock showed when this node's showed `moment`, both in seconds since the epoch."""
        return moment + self._ahead_s
