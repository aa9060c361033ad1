"""The driver's clock, as a card knows it. The clocks of nodes differ, and times of different cards are compared."""

from __future__ import annotations

import time
from collections.abc import Callable


class DriverClock:
    """Follows the driver's clock, which each poll brings along within milliseconds.

    Args:
        here: this node's clock, in seconds since the epoch.
    """

    def __init__(self, here: Callable[[], float] = time.time) -> None:
        self._here = here
        self._ahead_s = 0.0

    def hear(self, now: float) -> None:
        """The driver's clock stands at `now`, in seconds since the epoch."""
        self._ahead_s = now - self._here()

    def convert(self, moment: float) -> float:
        """What the driver's clock showed when this node's showed `moment`, both in seconds since the epoch."""
        return moment + self._ahead_s
