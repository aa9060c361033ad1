"""Work that must not grow with rows, batches or shards that are none of its own; it is counted, not timed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gaudi_batch import JobConfig
from gaudi_batch.card.actor import Card
from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.shard_result import PipelineCall
from gaudi_batch.card.shard_runner import ShardRows
from gaudi_batch.config.bounds import bounds_for
from gaudi_batch.dataset import reader as prompts
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.dataset.rows import PromptRow, RowRules, make_row
from gaudi_batch.dataset.scan import row_spans
from gaudi_batch.driver.rerun import plan_rerun
from gaudi_batch.pipelines.base import Generated
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.scheduling.events import Reading

RULES = RowRules(Bucket(64, 64, 20, 7.5), 1, None, 8, bounds_for(64, 64))
ROWS = 4000
GROUP = 500


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of which a PromptRow has been made."""
    numbers: list[int] = []
    make = make_row

    def counted(number: int, *others: Any) -> PromptRow:
        numbers.append(number)
        return make(number, *others)

    monkeypatch.setattr(prompts, "make_row", counted)
    return numbers


@pytest.fixture
def dataset(write_prompts: Callable[..., Path]) -> PromptDataset:
    """One file, whose rows are of five sizes in turn."""
    table = {
        "prompt": pa.array([f"prompt {row}" for row in range(ROWS)], pa.string_view()),
        "width": [64 + 8 * (row % 5) for row in range(ROWS)],
        "topic": [f"topic {row}" for row in range(ROWS)],
    }
    directory = write_prompts(table, row_group_size=GROUP)
    return open_prompts(JobConfig(prompts=str(directory), output="out", device="simulated"))


def test_a_shard_builds_the_rows_of_its_own_bucket_and_no_other(dataset: PromptDataset, built: list[int]) -> None:
    shards = list(plan_shards(row_spans(dataset, RULES), ROWS, ShardSizes(10, rows=100)))
    for shard in shards:
        rows, carried = dataset.read(shard, RULES)
        assert {row.bucket for row in rows} == {shard.bucket}
        assert carried.column("topic").to_pylist() == [f"topic {row.row}" for row in rows]
        assert [row.prompt for row in rows] == [f"prompt {row.row}" for row in rows]
    assert sorted(built) == list(range(ROWS))


def test_rows_that_are_made_again_alone_are_built_and_their_row_groups_alone_decoded(
    dataset: PromptDataset, built: list[int]
) -> None:
    only = (3, 503, 508, 2003, 3998)
    shard = Shard(0, 0, 3, 3999, Bucket(88, 64, 20, 7.5), 5, 5, only=only)
    readings: list[Reading] = []
    rows, carried = dataset.read(shard, RULES, ShardTask(shard, "a1"), readings.append)
    assert [row.row for row in rows] == built == list(only)
    assert carried.column("topic").to_pylist() == [f"topic {row}" for row in only]
    assert [(reading.group, reading.rows) for reading in readings] == [
        (0, range(3, 4)),
        (1, range(503, 509)),
        (4, range(2003, 2004)),
        (7, range(3998, 3999)),
    ]


def test_rows_are_planned_again_without_reading_the_prompts(
    dataset: PromptDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = list(plan_shards(row_spans(dataset, RULES), ROWS, ShardSizes(10, rows=100)))
    whose = {row: shard.number for shard in plan for row in range(shard.start, shard.stop)
             if 64 + 8 * (row % 5) == shard.bucket.width}  # fmt: skip
    monkeypatch.setattr(PromptDataset, "open_file", lambda *_: pytest.fail("the prompts are read"))
    added = plan_rerun({row: whose[row] for row in range(0, ROWS, 7)}, {7: 3}, plan, dataset, 50)
    assert sorted(row for shard in added for row in shard.only or ()) == list(range(0, ROWS, 7))
    assert sum(shard.images for shard in added) == len(range(0, ROWS, 7)) + 2
    assert max(shard.rows for shard in added) == 50


class CountedFuture(Future[Any]):
    """Counts how often somebody asks how it has ended."""

    asked = 0

    def done(self) -> bool:
        CountedFuture.asked += 1
        return super().done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        CountedFuture.asked += 1
        return super().exception(timeout)


class StoreAtOnce:
    """A pool whose work is done at once."""

    def adjust(self) -> None:
        """There is nothing to adjust."""

    def submit(self, *_: Any) -> CountedFuture:
        future = CountedFuture()
        future.set_result(None)
        return future


def test_a_card_does_not_go_through_all_batches_after_each(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = 300
    monkeypatch.setattr(CountedFuture, "asked", 0)
    card = Card.__new__(Card)
    config = JobConfig(prompts="p", output="o", device="simulated", batch_size=1)
    vars(card).update(
        _setup=SimpleNamespace(job=SimpleNamespace(config=config)),
        _storage=None,
        _mailbox=Mailbox(lambda: 0.0),
        _store=StoreAtOnce(),
        _store_slots=threading.Semaphore(1),
        _finisher=SimpleNamespace(submit=lambda *_: None),
        _probes={},
        _fetched=queue.Queue(),
    )
    image = np.full((1, 8, 8, 3), 0.5, np.float32)
    made = Generated(image, [False], [False]), PipelineCall("steady", 1.0, 0.0)
    rows = [PromptRow(row, str(row), "p", "", None, RULES.bucket, 1, None) for row in range(batches)]
    shard = Shard(0, 0, 0, batches, RULES.bucket, batches, batches)
    vars(card)["_pipeline"] = SimpleNamespace(graph_key=lambda *_: None, call=lambda *_: made)
    card._make(ShardRows(ShardTask(shard, "a1"), rows, pa.table({})))
    assert CountedFuture.asked <= 3 * batches
