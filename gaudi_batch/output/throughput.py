"""What each card did: a line per batch, and the sums of lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BatchLine:
    """One batch, as `throughput/<card>/<shard>-<attempt>.jsonl` has it."""

    time: str
    """When its images were in storage, ISO 8601, UTC."""
    card: str
    node: str
    module: int | None
    device: str
    shard: int
    batch: int
    """Number within the shard."""
    bucket: dict[str, float]
    """Width, height, steps and guidance scale."""
    phase: str
    """`warmup` (the first batches of a graph key on a card, which compile) or `steady`."""
    images: int
    padding: int
    """Images that were generated to fill the batch and dropped."""
    generate_s: float
    images_per_s: float
    wait_s: float
    """Seconds for which the device was idle before this batch."""
    encode_s: float
    """Seconds summed over the batch's images, which are encoded in parallel."""
    upload_s: float
    """The same for uploads."""
    started_at: str = ""
    """When its pipeline call began, by the driver's clock, ISO 8601, UTC; `time` is by the clock of the card's node."""
    energy_j: float | None = None
    """Joules by the card's counter, from the end of the call before to the end of this one, waiting included. This and
    the following are null where nobody knows, and not in the lines of older versions."""
    watts: float | None = None
    """Mean of the looks at the card during the call; of a call of less than a second the one look after it."""
    temperature_c: float | None = None
    """The highest of these looks, degrees Celsius."""
    utilisation: float | None = None
    """Their mean, 0 to 1."""
    memory_used_mb: float | None = None
    """The most, 10^6 bytes of the card's memory."""
    throttled: str | None = None
    """Why the clocks were held back: `power`, `thermal` or both; empty if they were not."""

    def json(self) -> str:
        """The line."""
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class ThroughputTotals:
    """Sums of throughput lines; sums are added with `+`."""

    batches: int = 0
    images: int = 0
    padding: int = 0
    steady_images: int = 0
    steady_s: float = 0.0
    warmup_s: float = 0.0
    wait_s: float = 0.0
    encode_s: float = 0.0
    upload_s: float = 0.0
    energy_j: float = 0.0
    """Joules of the batches whose joules are known; 0 where none are, as in all of older versions."""
    energy_images: int = 0
    """Images of these batches."""

    @classmethod
    def of(cls, lines: Iterable[BatchLine]) -> ThroughputTotals:
        """Adds lines up."""
        total = cls()
        for line in lines:
            steady = line.phase == "steady"
            total += cls(
                batches=1,
                images=line.images,
                padding=line.padding,
                steady_images=line.images if steady else 0,
                steady_s=line.generate_s if steady else 0.0,
                warmup_s=0.0 if steady else line.generate_s,
                wait_s=line.wait_s,
                encode_s=line.encode_s,
                upload_s=line.upload_s,
                energy_j=line.energy_j or 0.0,
                energy_images=0 if line.energy_j is None else line.images,
            )
        return total

    def __add__(self, other: ThroughputTotals) -> ThroughputTotals:
        # By name, since a run has as many sums as shards.
        return ThroughputTotals(
            self.batches + other.batches,
            self.images + other.images,
            self.padding + other.padding,
            self.steady_images + other.steady_images,
            self.steady_s + other.steady_s,
            self.warmup_s + other.warmup_s,
            self.wait_s + other.wait_s,
            self.encode_s + other.encode_s,
            self.upload_s + other.upload_s,
            self.energy_j + other.energy_j,
            self.energy_images + other.energy_images,
        )

    @property
    def images_per_s(self) -> float | None:
        """Images a second of generation, warm-up left out; None before the first steady batch."""
        return self.steady_images / self.steady_s if self.steady_s > 0 else None

    @property
    def images_per_s_with_warmup(self) -> float | None:
        """The same with the first batches, which compile; None before any batch."""
        seconds = self.steady_s + self.warmup_s
        return self.images / seconds if seconds > 0 else None

    @property
    def busy_share(self) -> float | None:
        """The share of its time for which the device was generating, 0 to 1."""
        busy = self.steady_s + self.warmup_s
        return busy / (busy + self.wait_s) if busy + self.wait_s > 0 else None

    @property
    def joules_per_image(self) -> float | None:
        """Joules an image, of the images whose joules are known; None where none are."""
        return self.energy_j / self.energy_images if self.energy_j > 0 and self.energy_images else None

    def describe(self) -> dict[str, Any]:
        """The sums as the summary has them."""
        return {
            "images": self.images,
            "batches": self.batches,
            "padding": self.padding,
            "images_per_s": rounded(self.images_per_s),
            "images_per_s_with_warmup": rounded(self.images_per_s_with_warmup),
            "busy_share": rounded(self.busy_share),
            "warmup_s": rounded(self.warmup_s),
            "generate_s": rounded(self.steady_s + self.warmup_s),
            "wait_s": rounded(self.wait_s),
            "encode_s": rounded(self.encode_s),
            "upload_s": rounded(self.upload_s),
            "energy_j": rounded(self.energy_j) if self.energy_j > 0 else None,
            "energy_images": self.energy_images,
            "joules_per_image": rounded(self.joules_per_image),
        }


def rounded(value: float | None) -> float | None:
    """A figure rounded to four significant digits, as records have it."""
    return None if value is None else round(value, 4)
