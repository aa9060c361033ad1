"""What a card's process has done since it started, as sums that only grow: what the driver makes metrics of."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import sub

BATCH_BOUNDS_S = (
    0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0,
    15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 900.0, 1800.0,
)  # fmt: skip
"""Upper bounds of the buckets that batches are counted in, in seconds. A batch of Stable Diffusion takes seconds,
one of FLUX a minute, and one that compiles up to `limits.first_batch`, half an hour."""
_NO_BATCH = (0,) * (len(BATCH_BOUNDS_S) + 1)


@dataclass(frozen=True)
class CardWork:
    """Sums over the life of one process."""

    images: int = 0
    """Images that are in storage, those of attempts that are dropped included."""
    generate_s: float = 0.0
    """Seconds for which the device was generating."""
    wait_s: float = 0.0
    """Seconds for which it was idle before a batch."""
    batches: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """How many batches took how long, by phase (`warmup`, `steady`): a count for each of BATCH_BOUNDS_S, and one for
    those that took longer than the last."""

    def with_batch(self, phase: str, generate_s: float, wait_s: float) -> CardWork:
        """These sums and one batch more."""
        counts = list(self.batches.get(phase, _NO_BATCH))
        counts[bisect_left(BATCH_BOUNDS_S, generate_s)] += 1
        batches = {**self.batches, phase: tuple(counts)}
        return CardWork(self.images, self.generate_s + generate_s, self.wait_s + wait_s, batches)

    def with_images(self, images: int) -> CardWork:
        """These sums and images more."""
        return CardWork(self.images + images, self.generate_s, self.wait_s, self.batches)

    def since(self, before: CardWork) -> CardWork:
        """What was done since an earlier look at the same card. With a sum that is smaller than it was, another process
        has taken the place of that one, and all of it is new."""
        sums = zip(
            (self.images, self.generate_s, self.wait_s), (before.images, before.generate_s, before.wait_s), strict=True
        )
        fewer = any(
            now < then
            for phase, counts in before.batches.items()
            for now, then in zip(self.batches.get(phase, _NO_BATCH), counts, strict=True)
        )
        if fewer or any(now < then for now, then in sums):
            before = CardWork()
        return CardWork(
            self.images - before.images,
            self.generate_s - before.generate_s,
            self.wait_s - before.wait_s,
            {
                phase: tuple(map(sub, counts, before.batches.get(phase, _NO_BATCH)))
                for phase, counts in self.batches.items()
            },
        )
