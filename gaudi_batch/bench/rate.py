"""How fast a card was with a batch size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gaudi_batch.pipelines.base import DeviceMemory


@dataclass(frozen=True)
class Rate:
    """Seconds of several calls with one batch size."""

    batch_size: int
    seconds: tuple[float, ...]
    memory: DeviceMemory | None = None
    """Of the device meanwhile, warm-up included; None where the device does not tell."""

    @property
    def latency(self) -> float:
        """Seconds of a call, the median."""
        return statistics.median(self.seconds)

    @property
    def images_per_s(self) -> float:
        """Images a second at the median."""
        return self.batch_size / self.latency


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table; the first row is its head."""
    columns = range(len(rows[0]))
    ruled = [rows[0], tuple("---" for _ in columns), *rows[1:]]
    widths = [max(len(row[column]) for row in ruled) for column in columns]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in ruled
    ]


def caveat(device: str) -> list[str]:
    """What a reader must know of figures of a device that is none, as a line; no line for a real one."""
    if "emulated" in device:
        return ["EMULATED CARDS: a CPU computed this, and the figures say nothing of a Gaudi"]
    if device == "simulated":
        return ["SIMULATED CARDS: they sleep for as long as the job says, and the figures say nothing of a model"]
    return []
