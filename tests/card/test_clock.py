"""A card knows the driver's clock, however late its polls come."""

from __future__ import annotations

import pytest

from gaudi_batch.card.clock import POLLS_KEPT, DriverClock


class World:
    """A driver whose clock shows the seconds, and a node whose clock is `off` from that."""

    def __init__(self, off: float) -> None:
        self.now, self.off = 1e9, off
        self.clock = DriverClock(lambda: self.now + self.off)

    def poll(self, late_s: float) -> None:
        self.now += 1.0
        self.clock.hear(self.now - late_s)

    def error(self) -> float:
        return self.clock.convert(self.now + self.off) - self.now


@pytest.mark.parametrize("off", [0.0, 120.0, -3600.0])
def test_polls_that_come_late_move_no_moment(off: float) -> None:
    world = World(off)
    world.poll(0.002)
    for late_s in (0.4, 0.9, 0.05, 2.0):
        world.poll(late_s)
        assert world.error() == pytest.approx(-0.002, abs=1e-6)


@pytest.mark.parametrize("step", [30.0, -30.0])
def test_a_clock_that_was_set_is_followed(step: float) -> None:
    world = World(0.0)
    for _ in range(POLLS_KEPT):
        world.poll(0.01)
    world.off += step
    for _ in range(POLLS_KEPT):
        world.poll(0.01)
    assert world.error() == pytest.approx(-0.01, abs=1e-6)


def test_before_the_first_poll_its_own_clock_counts() -> None:
    assert DriverClock().convert(7.0) == 7.0
