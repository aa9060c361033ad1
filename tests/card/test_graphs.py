"""Which graphs a card keeps, and which batches count as the first of their key."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest

from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.telemetry import Telemetry
from gaudi_batch.card.warm_pipeline import WarmPipeline
from gaudi_batch.pipelines.base import Item, OutOfDeviceMemory
from gaudi_batch.plan import Bucket, Shard

ITEM = Item(0, 0, "a", "", 1)


class Graphs:
    """A pipeline that keeps a graph for each width, and has memory for so many.

    Args:
        together: whether it gives up all graphs at once.
        room: graphs for which there is memory.
    """

    device = "emulated"
    warmup_batches = 1

    def __init__(self, together: bool, room: int = 99) -> None:
        self.together, self.room = together, room
        self.kept: list[Hashable] = []
        self.captured: list[Hashable] = []

    def graph_key(self, bucket: Bucket, item: Item) -> Hashable:
        return bucket.width

    def generate(self, bucket: Bucket, items: list[Item]) -> None:
        if bucket.width not in self.kept:
            if len(self.kept) == self.room:
                raise OutOfDeviceMemory("no memory")
            self.kept.append(bucket.width)
            self.captured.append(bucket.width)

    def forget(self, key: Hashable) -> bool:
        self.kept = [] if self.together else [other for other in self.kept if other != key]
        return self.together


def warm(pipeline: Any, max_graphs: int) -> WarmPipeline:
    return WarmPipeline(pipeline, max_graphs, Mailbox(lambda: 0.0), Telemetry(None))


def phases(pipeline: WarmPipeline, *widths: int) -> list[str]:
    shards = [Shard(0, 0, 0, 1, Bucket(width, 64, 5, 7.5), 1, 1) for width in widths]
    return [pipeline.call(shard, [ITEM])[1].phase for shard in shards]


def test_the_least_recently_used_graph_is_given_up() -> None:
    pipeline = Graphs(together=False)
    assert phases(warm(pipeline, 2), 64, 96, 64, 128, 64, 96) == ["warmup"] * 2 + [
        "steady",
        "warmup",
        "steady",
        "warmup",
    ]
    assert pipeline.captured == [64, 96, 128, 96]
    assert sorted(map(str, pipeline.kept)) == ["64", "96"]


def test_where_all_go_at_once_all_are_first_batches_again() -> None:
    pipeline = Graphs(together=True)
    assert phases(warm(pipeline, 2), 64, 96, 128, 64, 128, 64) == ["warmup"] * 4 + ["steady"] * 2
    assert pipeline.captured == [64, 96, 128, 64]


@pytest.mark.parametrize("together", [False, True])
def test_a_card_without_memory_gives_up_other_graphs_before_it_gives_up(together: bool) -> None:
    pipeline = Graphs(together, room=2)
    card = warm(pipeline, 9)
    assert phases(card, 64, 96, 128, 128) == ["warmup", "warmup", "warmup", "steady"]
    assert pipeline.kept == [128]
    pipeline.room = 0
    pipeline.kept.clear()
    with pytest.raises(OutOfDeviceMemory):
        phases(card, 160)
