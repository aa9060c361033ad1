"""A card's pipeline: which graphs it keeps, and which batches are the first of their graph key."""

from __future__ import annotations

import functools
import time
from collections.abc import Hashable

from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.shard_result import PipelineCall
from gaudi_batch.card.telemetry import Telemetry
from gaudi_batch.pipelines.base import DeviceError, Generated, Item, OutOfDeviceMemory, Pipeline
from gaudi_batch.plan import Bucket, Shard


class WarmPipeline:
    """A pipeline with the graph keys that it has compiled. For one thread.

    Args:
        pipeline: the pipeline.
        max_graphs: graph keys whose graphs it keeps; for one more the least recently used is given up.
        mailbox: is told what the device does.
        telemetry: of the device.
    """

    def __init__(self, pipeline: Pipeline, max_graphs: int, mailbox: Mailbox, telemetry: Telemetry) -> None:
        self._pipeline = pipeline
        self._max_graphs = max_graphs
        self._mailbox = mailbox
        self._telemetry = telemetry
        self._warmups: dict[Hashable, int] = {}
        self.device = pipeline.device
        self._idle_since = 0.0

    def begin(self) -> None:
        """From now on the device waits for work."""
        self._idle_since = time.monotonic()
        self._telemetry.mark(self._idle_since, self._idle_since)

    def graph_key(self, bucket: Bucket, item: Item) -> Hashable:
        """See `Pipeline`."""
        return self._pipeline.graph_key(bucket, item)

    def call(self, shard: Shard, items: list[Item]) -> tuple[Generated, PipelineCall]:
        """Makes images, and says how long that took and how long the device had waited for them.

        Raises:
            DeviceError: the device failed.
            Exception: see `Pipeline.generate`.
        """
        bucket = shard.bucket
        key = self._pipeline.graph_key(bucket, items[0])
        self._warmups[key] = self._warmups.pop(key, 0)  # the last is the most recently used
        while len(self._warmups) > self._max_graphs:
            self._forget(next(iter(self._warmups)), key)
        warmup = self._warmups[key] < self._pipeline.warmup_batches
        started, began = time.monotonic(), time.time()
        wait_s = started - self._idle_since
        rows = tuple(dict.fromkeys(item.row for item in items if item.row >= 0))  # a probe has no row
        enter = functools.partial(self._mailbox.enter, kind=bucket.batch_kind, shard=shard.number, rows=rows)
        enter("first batch" if warmup else "batch")
        try:
            generated = self._pipeline.generate(bucket, items)
        except OutOfDeviceMemory as error:
            if len(self._warmups) == 1:
                raise
            warmup = True
            enter("first batch")
            generated = self._generate_alone(bucket, items, key, error)
        finally:
            self._idle_since = time.monotonic()
            mark = self._telemetry.mark(started, self._idle_since)
            self._mailbox.enter("idle")
        generate_s = self._idle_since - started
        self._warmups[key] += 1
        self._mailbox.batch_took(bucket.batch_kind, generate_s, warmup, wait_s)
        return generated, PipelineCall("warmup" if warmup else "steady", generate_s, wait_s, began, mark)

    def _generate_alone(self, bucket: Bucket, items: list[Item], key: Hashable, error: OutOfDeviceMemory) -> Generated:
        """A call of the pipeline that had no memory left, again without the graphs of other keys."""
        for other in [other for other in self._warmups if other != key]:
            self._forget(other, key)
        try:
            return self._pipeline.generate(bucket, items)
        except DeviceError:
            raise error from None

    def _forget(self, key: Hashable, current: Hashable) -> None:
        """Gives up what is compiled for a key. A pipeline that can't give up one key alone begins anew with all."""
        self._warmups.pop(key, None)
        if self._pipeline.forget(key):
            self._warmups = {current: 0}
