"""A device that sleeps for the time of a real card and paints flat images from seeds; it needs no model.

It can raise, die, hang and refuse to load on demand, for tests of all that surrounds a pipeline.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Hashable, Mapping

import numpy as np

from gaudi_batch.config.sections import SimulatedConfig
from gaudi_batch.pipelines.base import Generated, Item
from gaudi_batch.pipelines.stack import PACKAGES, versions
from gaudi_batch.plan import Bucket

DEFAULT_SIDE = 64
"""Side in pixels of simulated images, unless the job asks for a size."""


class SimulatedPipeline:
    """See the module.

    Args:
        config: how long things take and what goes wrong.
        module: the module that the card holds, to which some faults belong.
    """

    device = "simulated"
    model = ""
    threads: int | None = None
    warmup_batches = 1

    def __init__(self, config: SimulatedConfig, module: int | None) -> None:
        time.sleep(config.load_seconds)
        if module in config.unloadable_modules:
            raise RuntimeError(f"simulated failure to load on module {module}")
        self.stack: Mapping[str, str] = versions(PACKAGES) | {"device": self.device}
        self._config = config
        self._module = module
        self._captured: set[Hashable] = set()

    def generate(self, bucket: Bucket, items: list[Item]) -> Generated:
        """Sleeps for a batch and paints each image in one colour, red, green and blue from 1 to 255, by its seed."""
        rows = {item.row for item in items}
        if rows.intersection(self._config.kill_rows):
            os.kill(os.getpid(), signal.SIGKILL)
        if rows.intersection(self._config.kill_node_rows):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(float(2**31))
        if rows.intersection(self._config.hang_rows):
            time.sleep(float(2**31))
        if self._module in self._config.broken_modules:
            raise RuntimeError(f"simulated failure of module {self._module}")
        if raising := rows.intersection(self._config.raise_rows):
            raise RuntimeError(f"simulated failure of row {min(raising)}")
        new = bucket.graph_key not in self._captured
        self._captured.add(bucket.graph_key)
        seconds = self._config.seconds_by_size.get(f"{bucket.width}x{bucket.height}", self._config.batch_seconds)
        seconds += self._config.capture_seconds if new else 0
        time.sleep(seconds * (self._config.slow_factor if self._module in self._config.slow_modules else 1))
        images = np.empty((len(items), bucket.height, bucket.width, 3), np.float32)
        for image, item in zip(images, items, strict=True):
            image[:] = np.random.default_rng(item.seed).integers(1, 256, 3) / 255
            if self._module in self._config.lying_modules and random.random() < self._config.lying_share:
                image[0, 0] = np.nan
        return Generated(images, [None] * len(items), [False] * len(items))

    def graph_key(self, bucket: Bucket, item: Item) -> Hashable:
        """See `Pipeline`."""
        return bucket.graph_key

    def forget(self, key: Hashable) -> bool:
        """Makes the next batch of this key capture again."""
        self._captured.discard(key)
        return False

    def take_memory_peak(self) -> None:
        """Nothing: there is no memory."""

    def notes(self) -> list[str]:
        """None."""
        return []
