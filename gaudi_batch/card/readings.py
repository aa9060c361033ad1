"""What a card's counters say, and which of it is taken for true: a library that lies must not get into the records."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

MAX_WATTS = 2000.0
"""No card draws more. Intel gives 600 W for a Gaudi 2 and 900 W for an air-cooled Gaudi 3 (HL-325L); the rest is room
for peaks and for cards to come."""
MIN_WATTS = 1.0
"""No card that answers draws less; one of them idles at some 100 W. Watts in place of milliwatts are found by this."""
MAX_TEMPERATURE_C = 150.0
"""The chip shuts down far below."""
MAX_MEMORY_BYTES = 1 << 40
"""A Gaudi 3 has 128 GB."""
COUNTER_LAG_S = 2.0
"""Seconds by which the energy counter may be behind, as the card's firmware writes it from time to time."""
MAX_STILL_S = 10.0
"""A counter that has not moved for so many seconds is not counting."""
THROTTLE_REASONS = {1: "power", 2: "thermal"}
"""Bits of `hlml_device_get_current_clocks_throttle_reasons`; hlml.h has no others."""


@dataclass(frozen=True)
class Readings:
    """What throughput lines and progress.json say of a card's counters; None where it is not known."""

    energy_j: float | None = None
    """Joules that the energy counter went up by, of a batch."""
    watts: float | None = None
    temperature_c: float | None = None
    """Of the chip, degrees Celsius."""
    utilisation: float | None = None
    """As the driver has it, 0 to 1."""
    memory_used_mb: float | None = None
    """Of the card's memory, 10^6 bytes."""
    throttled: str | None = None
    """Why the clocks are held back: `power`, `thermal` or both; empty if they are not."""


@dataclass(frozen=True)
class Sample:
    """One sample of a card's counters, of which what can't be is left out."""

    at: float
    """When it was taken, monotonic."""
    energy_mj: int | None
    """The energy counter, millijoules since the driver was loaded."""
    now: Readings
    """The rest."""


class Judge:
    """Tells what can be from what can't. The first thing that can't be is a warning, the others are not said.

    Args:
        module: of the card, for the log.
    """

    def __init__(self, module: int) -> None:
        self._module = module
        self._warned = False
        self._moved = (0.0, -1)  # when the energy counter was first seen where it is, and where that is

    def judge(self, answer: Mapping[str, Any]) -> Sample:
        """A sample of the counters as libhlml gives it: numbers in its units, None where it gives none."""
        at = float(answer["at"])
        energy = self._energy(at, self._within(answer, "energy_mj", 1, 1 << 63))
        power = self._within(answer, "power_mw", MIN_WATTS * 1000, MAX_WATTS * 1000)
        temperature = self._within(answer, "temperature_c", 1, MAX_TEMPERATURE_C)
        utilisation = self._within(answer, "utilisation_percent", 0, 100)
        memory = self._within(answer, "memory_used", 0, MAX_MEMORY_BYTES)
        bits = self._within(answer, "throttle_bits", 0, (1 << 64) - 1)
        return Sample(
            at,
            energy,
            Readings(
                watts=None if power is None else power / 1000,
                temperature_c=temperature,
                utilisation=None if utilisation is None else utilisation / 100,
                memory_used_mb=None if memory is None else memory / 1e6,
                throttled=None if bits is None else _reasons(bits),
            ),
        )

    def joules(self, before: Sample, after: Sample) -> float | None:
        """By how many joules the energy counter went up between two samples; None if nobody knows."""
        if before.energy_mj is None or after.energy_mj is None:
            return None
        joules = (after.energy_mj - before.energy_mj) / 1000
        seconds = after.at - before.at
        if joules < 0:
            self._reject(f"an energy counter that went back by {-joules:g} J")
            return None
        if joules > MAX_WATTS * (seconds + COUNTER_LAG_S):
            self._reject(f"an energy counter that went up by {joules:g} J in {seconds:.1f} s")
            return None
        return joules

    def _energy(self, at: float, counter: int | None) -> int | None:
        if counter is None:
            return None
        since, known = self._moved
        if counter != known:
            self._moved = (at, counter)
        elif at - since > MAX_STILL_S:
            self._reject(f"an energy counter that has been at {counter} mJ for more than {MAX_STILL_S:g} s")
            return None
        return counter

    def _within(self, answer: Mapping[str, Any], name: str, low: float, high: float) -> int | None:
        value = answer.get(name)
        if value is None:
            return None
        if type(value) is int and low <= value <= high:
            return value
        self._reject(f"{name} {value!r}, which is not from {low:g} to {high:g}")
        return None

    def _reject(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("module %d: libhlml gives %s; records leave out such values", self._module, what)


def _reasons(bits: int) -> str:
    names = [THROTTLE_REASONS.get(1 << bit, f"bit {bit}") for bit in range(bits.bit_length()) if bits >> bit & 1]
    return " and ".join(names)


def over_time(energy_j: float | None, samples: Sequence[Sample]) -> Readings:
    """What several samples come to: the mean of watts and of utilisation, the most of temperature and memory, and all
    reasons for which the clocks were held back.

    Args:
        energy_j: joules in that time.
        samples: at least one.
    """

    def known(name: str) -> list[Any]:
        values = [getattr(sample.now, name) for sample in samples]
        return [value for value in values if value is not None]

    def mean(values: list[float]) -> float | None:
        return round(sum(values) / len(values), 3) if values else None

    reasons = known("throttled")
    return Readings(
        energy_j=energy_j,
        watts=mean(known("watts")),
        temperature_c=max(known("temperature_c"), default=None),
        utilisation=mean(known("utilisation")),
        memory_used_mb=max(known("memory_used_mb"), default=None),
        throttled=" and ".join(dict.fromkeys(part for text in reasons for part in text.split(" and ") if part))
        if reasons
        else None,
    )
