"""What a card owes its run when something in it breaks, and what it keeps of a row that failed."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gaudi_batch.card.actor import BATCHES_IN_STORE, Card
from gaudi_batch.card.clock import DriverClock
from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.same_storage import require_shared
from gaudi_batch.card.shard_result import CardIdentity, PipelineCall, ShardRecorder, StoredBatch
from gaudi_batch.card.shard_runner import ShardRows
from gaudi_batch.card.store_pool import StorePool
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import EncodingConfig
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.driver.committer import check_storage
from gaudi_batch.errors import StorageError
from gaudi_batch.output.formats.base import Attempt
from gaudi_batch.output.formats.encoding import encode
from gaudi_batch.output.formats.files import FilesOutput
from gaudi_batch.output.holder import Lease
from gaudi_batch.output.manifest import StoredImage, read
from gaudi_batch.output.throughput import BatchLine, ThroughputTotals
from gaudi_batch.pipelines.base import Item
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.storage.store import Storage

BUCKET = Bucket(64, 64, 20, 7.5)


DYING = """
import time
from types import SimpleNamespace
from gaudi_batch.card import actor as card
card.card_placement = lambda device: ("n", "vm", 0)
def dies(self):
    raise ZeroDivisionError
def waits(self):
    time.sleep(600)
card.Card._fetch, card.Card._generate = ({0}, {1})
store = SimpleNamespace(longest_running_s=lambda: 0.0)
config, dataset = SimpleNamespace(device="simulated"), SimpleNamespace(storage=store)
job = SimpleNamespace(config=config, dataset=dataset)
card.Card(SimpleNamespace(job=job, storage=store, tracker=None))
time.sleep(600)
"""


@pytest.mark.parametrize("threads", [("dies", "waits"), ("waits", "dies")])
def test_a_thread_of_a_card_that_dies_ends_its_process(threads: tuple[str, str]) -> None:
    """Else the card would look alive and do nothing."""
    code = DYING.format(*threads)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 70
    assert "ZeroDivisionError" in ended.stderr


def test_the_images_of_a_row_that_failed_after_all_are_removed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    output = FilesOutput(storage, EncodingConfig(), Attempt(3, "aaaaa1"))
    pixels = np.zeros((8, 8, 3), np.uint8)
    items = [Item(0, 0, "p", "", 1), Item(1, 0, "p", "", 1)]
    futures: list[Future[StoredImage]] = []
    for item in items:
        futures.append(Future())
        futures[-1].set_result(output.add(item.row, item.image, pixels))
    batch = StoredBatch("aaaaa1", PipelineCall("steady", 1.0, 0.0), 0, [(item, None, False) for item in items], futures)
    config = SimpleNamespace(seed=0, batch_size=2, format="files")
    setup: Any = SimpleNamespace(run_id="run", storage=storage, job=SimpleNamespace(config=config))
    recorder = ShardRecorder(setup, DriverClock())
    rows = [PromptRow(row, str(row), "p", "", None, BUCKET, 1, None) for row in range(2)]
    work = ShardRows(ShardTask(Shard(3, 0, 0, 2, BUCKET, 2, 2), "aaaaa1"), rows, pa.table({"topic": ["t", "t"]}))
    maker: Any = SimpleNamespace(failures={1: "boom"}, doubted={}, raised={1}, transient_failures=0)
    done = recorder.record(CardIdentity("vm-0", "vm", 0, "simulated"), work, output, maker, [batch])
    named = [path for path in read(done.manifest)[0].column("path").to_pylist() if path]
    stored = [str(path.relative_to(tmp_path)) for path in (tmp_path / "images").rglob("*.png")]
    assert named == stored == ["images/000003-aaaaa1/00000000-00.png"]


class Slots(threading.Semaphore):
    """A semaphore that notes who waits for it."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.waiters: queue.Queue[int] = queue.Queue()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if super().acquire(blocking=False):
            return True
        if blocking:
            self.waiters.put(1)
        return super().acquire(blocking, timeout)


def test_a_card_makes_no_more_batches_than_storage_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pixels may be larger than memory."""
    made: list[int] = []

    class Maker:
        probe = None

        def __init__(self, *, call: Any, **_: Any) -> None:
            self._call = call

        def batches(self) -> Iterator[list[Any]]:
            for number in range(20):
                self._call([])
                made.append(number)
                yield []

    monkeypatch.setattr("gaudi_batch.card.actor.ShardMaker", Maker)
    card: Any = Card.__new__(Card)
    card._store_slots, card._storage, card._probes = Slots(BATCHES_IN_STORE), None, {}
    card._store = StorePool(2)
    call = PipelineCall("steady", 1.0, 0.0)
    card._pipeline = SimpleNamespace(graph_key=lambda bucket, item: None, call=lambda shard, items: (None, call))
    config = SimpleNamespace(encoding=None, batch_size=1, seed=0, format="files")
    card._setup = SimpleNamespace(job=SimpleNamespace(config=config))
    card._mailbox = Mailbox(lambda: 0.0)
    card._store_batch = lambda output, batch, *_: batch  # and none of them ever ends
    work = ShardRows(ShardTask(Shard(0, 0, 0, 20, BUCKET, 20, 20), "aaaaa1"), [], pa.table({}))
    threading.Thread(target=card._make, args=(work,), daemon=True).start()
    for waits_with in (BATCHES_IN_STORE + 1, BATCHES_IN_STORE + 2):
        card._store_slots.waiters.get(timeout=60)
        assert len(made) == waits_with
        card._store_slots.release()


def test_a_node_that_does_not_see_the_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup: Any = SimpleNamespace(
        job=SimpleNamespace(
            dataset=SimpleNamespace(
                storage=Storage(str(tmp_path / "prompts")), files=[SimpleNamespace(name="p.parquet")]
            )
        ),
        storage=Storage(str(tmp_path / "out")),
        run_id="run",
        driver="aaaaa",
    )
    monkeypatch.setattr("gaudi_batch.card.same_storage.OutputReader.run", lambda ledger: SimpleNamespace(run_id="run"))
    with pytest.raises(RuntimeError, match=r"does not see the prompts in .*must be on a file system that all nodes"):
        require_shared(setup)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/p.parquet").touch()
    require_shared(setup)


@pytest.mark.parametrize(("driver", "sees"), [("aaaaa", True), ("bbbbb", False)])
def test_before_a_run_is_planned_a_node_sees_it_by_the_lease_of_its_driver(
    driver: str, sees: bool, tmp_path: Path
) -> None:
    (tmp_path / "p.parquet").touch()
    dataset = SimpleNamespace(storage=Storage(str(tmp_path)), files=[SimpleNamespace(name="p.parquet")])
    output = Storage(str(tmp_path / "out"))
    output.put("lease.json", json.dumps(asdict(Lease(driver, "host", "machine", 1, "", 1, ()))).encode())
    setup: Any = SimpleNamespace(job=SimpleNamespace(dataset=dataset), storage=output, run_id="run", driver="aaaaa")
    with contextlib.nullcontext() if sees else pytest.raises(RuntimeError, match="does not see this run"):
        require_shared(setup)


def test_a_card_looks_whether_its_node_sees_what_the_others_see_before_it_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(setup: object) -> None:
        raise RuntimeError("not on a file system that all nodes share")

    monkeypatch.setattr("gaudi_batch.card.actor.require_shared", refused)
    monkeypatch.setattr("gaudi_batch.card.actor.load_pipeline", lambda *_: pytest.fail("it loads"))
    emitted: list[Any] = []
    card: Any = Card.__new__(Card)
    card._setup, card._mailbox = None, SimpleNamespace(emit=emitted.append)
    card._generate()
    (broken,) = emitted
    assert "not on a file system that all nodes share" in broken.error


def test_prompts_that_were_replaced_end_the_run_when_a_card_says_that_storage_fails(tmp_path: Path) -> None:
    """The card's failure may be theirs, and no image of others may be made."""
    pq.write_table(pa.table({"prompt": ["a", "b"]}), tmp_path / "p.parquet")
    dataset = open_prompts(JobConfig(prompts=str(tmp_path / "p.parquet"), output=str(tmp_path), device="simulated"))
    output = Storage(str(tmp_path / "out"))
    output.put("run.json", b"{}")
    ledger: Any = SimpleNamespace(storage=output)
    shard = Shard(0, 0, 0, 2, BUCKET, 2, 2)
    assert check_storage(ledger, dataset, shard, "aaaaa") is None
    pq.write_table(pa.table({"prompt": ["a", "b", "another"]}), tmp_path / "p.parquet")
    with pytest.raises(StorageError, match=r"'p\.parquet' is not what it was when it was planned"):
        check_storage(ledger, dataset, shard, "aaaaa")


def test_the_quality_of_a_job_decides_about_the_bytes() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for kind in ("jpeg", "webp"):
        sizes = [len(encode(pixels, EncodingConfig(type=kind, quality=quality))) for quality in (20, 60, 95)]
        assert sizes == sorted(set(sizes)), kind


def test_a_job_that_says_nothing_gets_png_and_else_a_quality_of_95() -> None:
    assert (EncodingConfig().type, EncodingConfig(type="jpeg").quality) == ("png", 95)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert encode(pixels, EncodingConfig(type="jpeg")) == encode(pixels, EncodingConfig(type="jpeg", quality=95))


def test_first_batches_are_no_part_of_the_rate() -> None:
    def line(phase: str, images: int, seconds: float) -> BatchLine:
        now = datetime.now(timezone.utc).isoformat()
        return BatchLine(now, "c", "n", 0, "simulated", 0, 0, {}, phase, images, 0, seconds, 1.0, 0.0, 0.0, 0.0)

    sums = ThroughputTotals.of([line("warmup", 8, 100.0), line("steady", 8, 2.0), line("steady", 4, 2.0)])
    assert (sums.images_per_s, sums.warmup_s, sums.steady_s) == (3.0, 100.0, 4.0)
    assert ThroughputTotals.of([line("warmup", 8, 100.0)]).images_per_s is None


def test_an_image_that_can_t_be_stored_is_no_row_s_fault(tmp_path: Path) -> None:
    failed: Future[StoredImage] = Future()
    failed.set_exception(StorageError("no space"))
    batch = StoredBatch(
        "aaaaa1", PipelineCall("steady", 1.0, 0.0), 0, [(Item(0, 0, "p", "", 1), None, False)], [failed]
    )
    maker: Any = SimpleNamespace(failures={}, doubted={}, raised=set())
    nobody: Any = None
    with pytest.raises(StorageError, match="no space"):
        ShardRecorder(nobody, nobody).record(nobody, nobody, nobody, maker, [batch])
    assert maker.failures == {}
