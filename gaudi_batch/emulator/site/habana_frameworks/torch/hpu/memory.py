"""Memory of the device, counted from the tensors that live in it."""

from __future__ import annotations

from typing import Any

from habana_frameworks._emulation import modules
from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.settings import settings


def memory_allocated(device: Any = None) -> int:
    """Bytes in use."""
    modules.acquire()
    return counters.memory_in_use


def max_memory_allocated(device: Any = None) -> int:
    """Most bytes that were in use at once."""
    modules.acquire()
    return counters.memory_peak


memory_reserved = memory_allocated
max_memory_reserved = max_memory_allocated


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Bytes that are free, and in all."""
    modules.acquire()
    return settings().memory - counters.memory_in_use, settings().memory


def memory_stats(device: Any = None) -> dict[str, int]:
    """What the real stack calls Limit, InUse and MaxInUse, with zeros for what the emulator does not count."""
    modules.acquire()
    unknown = (
        "NumAllocs",
        "NumFrees",
        "ActiveAllocs",
        "MaxAllocSize",
        "TotalSystemAllocs",
        "TotalSystemFrees",
        "TotalActiveAllocs",
    )
    return {
        "Limit": settings().memory,
        "InUse": counters.memory_in_use,
        "MaxInUse": counters.memory_peak,
    } | dict.fromkeys(unknown, 0)


def memory_summary(device: Any = None) -> str:
    """The statistics as text."""
    return "\n".join(f"{name}: {value}" for name, value in memory_stats(device).items())


def reset_peak_memory_stats(device: Any = None) -> None:
    """Begins to measure the peak from here."""
    counters.memory_peak = counters.memory_in_use


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """Forgets sums over time, of which the emulator has none."""
