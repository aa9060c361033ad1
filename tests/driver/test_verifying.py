"""A verification goes on where an earlier one was ended, and no card that is lost holds it up."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from helpers import Unfenced
from records import BUCKET

from gaudi_batch.cluster.connection import CardResources
from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.driver import verifying
from gaudi_batch.driver.verifying import verify_run
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import VERIFYING_FILE
from gaudi_batch.output import manifest
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo, ImageInfo, StoredImage
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.output.verify import verify
from gaudi_batch.storage.store import Storage

SHARDS = 6


def a_run(storage: Storage) -> Any:
    """What `verify_run` reads of a run."""
    ledger = Ledger(storage, Unfenced())
    commits = Commits(ledger, "aaaaa")
    commits.refresh()
    connect: Any = lambda: CardResources("CPU", 1)  # noqa: E731
    return SimpleNamespace(
        ledger=ledger,
        commits=commits,
        info=SimpleNamespace(run_id="r1"),
        latest_shard_of_row={},
        cards=2,
        connect=connect,
    )


def commit(ledger: Ledger, shard: int) -> None:
    """A shard of two images."""
    images = {}
    for row in (2 * shard, 2 * shard + 1):
        path, data = f"images/{shard:06d}-aaaaa1/{row:08d}-00.png", f"image {row}".encode()
        ledger.storage.put(path, data)
        stored = StoredImage(path, hashlib.sha256(data).hexdigest(), datetime.now(timezone.utc), 0.0, 0.0)
        images[row, 0] = ImageInfo(stored, row, None, False)
    rows = [PromptRow(row, str(row), "p", "", None, BUCKET, 1, None) for row, _ in images]
    info = CommitInfo(shard, "aaaaa1", "c", "n", None, 2, 0, 2, ThroughputTotals(), "r1")
    assert ledger.commit(info, manifest.build(rows, pa.table({"topic": ["t", "t"]}), images, {}, 0, info))


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """Six shards in as many chunks; an image is missing, one is torn."""
    monkeypatch.setattr(verifying, "CHUNK_IMAGES", 2)
    monkeypatch.setattr(verifying, "SAVE_INTERVAL_S", 0.0)
    storage = Storage(str(tmp_path / "out"))
    storage.put("run.json", RunInfo({"device": "simulated"}, {}, {}, "now", rows=12, images=12, run_id="r1").encode())
    for shard in range(SHARDS):
        commit(Ledger(storage, Unfenced()), shard)
    storage.remove("images/000001-aaaaa1/00000002-00.png")
    storage.put("images/000004-aaaaa1/00000009-00.png", b"im")
    storage.put("images/000009-bbbbb1/x.png", b"x")
    return storage


EXPECTED = {
    "images": 12,
    "missing": ["images/000001-aaaaa1/00000002-00.png"],
    "torn": ["images/000004-aaaaa1/00000009-00.png"],
    "foreign": ["images/000009-bbbbb1"],
    "broken": [2, 9],
}


@pytest.fixture
def stopped(output: Storage, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends a verification before its n-th chunk."""

    def stop(chunk: int) -> None:
        with pytest.MonkeyPatch.context() as patched:
            left = [0] * chunk

            def verify_until(*arguments: Any) -> Any:
                if not left:
                    raise KeyboardInterrupt
                left.pop()
                return verify(*arguments)

            patched.setattr(verifying, "verify", verify_until)
            with pytest.raises(KeyboardInterrupt):
                verify_run(a_run(output))

    return stop


@pytest.fixture
def read(output: Storage, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The shards that are verified, chunk by chunk."""
    chunks = list[list[int]]()

    def noted(ledger: Any, shards: list[int], latest: Any) -> Any:
        chunks.append(shards)
        return verify(ledger, shards, latest)

    monkeypatch.setattr(verifying, "verify", noted)
    return chunks


def test_it_goes_on_where_it_was_ended(output: Storage, stopped: Callable[[int], None], read: list[list[int]]) -> None:
    stopped(4)
    assert output.names("")[-1] == VERIFYING_FILE
    read.clear()
    assert verify_run(a_run(output)).describe() == EXPECTED
    assert read == [[4], [5]]
    assert VERIFYING_FILE not in output.names("")
    assert verify_run(a_run(output)).describe() == EXPECTED
    assert len(read) == 2 + SHARDS, "once it has ended, all is verified anew"


@pytest.mark.parametrize("change", ["another manifest", "a day has passed", "damaged"])
def test_what_was_verified_before_counts_only_of_what_is_there(
    output: Storage, stopped: Callable[[int], None], read: list[list[int]], change: str
) -> None:
    stopped(4)
    if change == "another manifest":
        os.utime(output.full("manifest/000005.parquet"), ns=(1, 1))
    else:
        stored = json.loads(output.get(VERIFYING_FILE) or b"")
        stored |= {"time": 0.0} if change == "a day has passed" else {"report": {"images": None}}
        output.put(VERIFYING_FILE, json.dumps(stored).encode())
    read.clear()
    assert verify_run(a_run(output)).describe() == EXPECTED
    assert len(read) == SHARDS


def test_a_large_run_is_verified_on_the_cards_too(
    output: Storage, cluster: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    monkeypatch.setattr(verifying, "ALONE_IMAGES", 4)
    ray.init(cluster, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
    try:
        with caplog.at_level("INFO", "gaudi_batch"):
            assert verify_run(a_run(output)).describe() == EXPECTED
        assert "6 chunks are verified on 2 cards and here" in caplog.text
        assert "could not verify" not in caplog.text
        run = a_run(output)
        run.connect = lambda: CardResources("NOTHING_HAS_THIS", 1)
        assert verify_run(run).describe() == EXPECTED, "what no card takes up is verified here"
        run = a_run(output)
        run.info.run_id = "another"  # as on a node that does not see the output

        def after_a_card(*arguments: Any) -> Any:
            until = time.monotonic() + 60
            while "does not see this run" not in caplog.text:
                assert time.monotonic() < until
                time.sleep(0.05)
            return verify(*arguments)

        monkeypatch.setattr(verifying, "verify", after_a_card)  # of this process alone
        assert verify_run(run).describe() == EXPECTED
    finally:
        ray.shutdown()


def test_a_manifest_that_is_gone_is_no_shard_without_images(output: Storage) -> None:
    run = a_run(output)
    output.remove("manifest/000003.parquet")
    with pytest.raises(StorageError, match="1 manifests are gone or torn, the first of shard 3"):
        verify_run(run)


def test_a_chunk_that_a_card_fails_while_it_is_verified_here_is_not_taken_up_again(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six chunks: the cards keep two, of which one fails just when this process is at it; the other never ends."""
    import ray
    from ray.exceptions import WorkerCrashedError

    monkeypatch.setattr(verifying, "ALONE_IMAGES", 4)
    at_first, has_failed = threading.Event(), threading.Event()

    def verify_here(ledger: Any, shards: list[int], latest: Any) -> Any:
        if shards == [0]:
            at_first.set()
            assert has_failed.wait(30)
        return verify(ledger, shards, latest)

    def wait(tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        time.sleep(0.01)
        ended = [0] if at_first.is_set() and 0 in tasks else []
        return ended, tasks

    def get(task: int) -> Any:
        has_failed.set()
        raise WorkerCrashedError

    monkeypatch.setattr(verifying, "verify", verify_here)
    monkeypatch.setattr(verifying, "_task", lambda *_: lambda shards: shards[0])
    cancelled: list[int] = []
    for name, replacement in (("wait", wait), ("get", get), ("cancel", lambda task, force: cancelled.append(task))):
        monkeypatch.setattr(ray, name, replacement)
    assert verify_run(a_run(output)).describe() == EXPECTED
    assert cancelled == [1]
