"""What a driver says and refuses at the start and the end of a run, and what it writes nowhere."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Unfenced
from records import failed_manifest, no_cluster

from gaudi_batch import JobConfig
from gaudi_batch.cli import main as cli
from gaudi_batch.driver.finalize import sum_up
from gaudi_batch.driver.opening import open_run
from gaudi_batch.driver.run_context import Ended, Run
from gaudi_batch.errors import RunStopped
from gaudi_batch.job import Job
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.storage.store import Storage

BUCKET = Bucket(64, 64, 20, 7.5)


def test_another_version_than_the_run_began_with_is_said_where_no_card_was_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = RunInfo({"shard_size": 4}, {}, {"torch": "2.1", "numpy": "1.0"}, "now", rows=4, images=4, stacks=None)
    plan = [Shard(0, 0, 0, 4, BUCKET, 4, 4)]
    ledger: Any = SimpleNamespace(run=lambda: record, plan=lambda rows: plan, storage=SimpleNamespace(url="out"))
    job: Any = SimpleNamespace(
        versions=lambda: {"torch": "2.2", "numpy": "1.0"},
        fingerprint=dict,
        total_rows=4,
        config=SimpleNamespace(shard_size=4, limit=None),
    )
    with caplog.at_level(logging.WARNING, "gaudi_batch"):
        assert open_run(ledger, job, lambda: pytest.fail("no card is needed"), False) == (record, plan)
    assert caplog.messages == ["torch is 2.2 here and was 2.1 when the run began; images may differ"]


def test_a_run_is_complete_only_with_as_many_rows_as_were_planned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gaudi_batch")
    storage = Storage(str(tmp_path))
    storage.put("manifest/000000.parquet", failed_manifest(0, dict.fromkeys(range(4), "boom")))
    job: Any = SimpleNamespace(
        dataset=SimpleNamespace(files=[SimpleNamespace(first_row=0)], columns={}),
        config=SimpleNamespace(format="files"),
    )
    lease = LeaseKeeper(storage, "aaaaa")
    ledger = Ledger(storage, Unfenced())
    for rows in (3, 5):
        record = RunInfo({}, {}, {}, "now", rows=rows, images=rows)
        run = Run(job, ledger, lease, record, [Shard(0, 0, 0, 4, BUCKET, 4, 4)], no_cluster, Commits(ledger, "aaaaa"))
        with pytest.raises(RunStopped, match=f"the manifests have 4 rows, and the plan {rows}"):
            sum_up(run, CommitTotals(), Ended(None))
        assert (ledger.get_json("summary.json") or {})["state"] == "stopped"
        figures, failed = caplog.messages[-2:]
        assert figures.startswith("stopped: 0 images, 4 failed rows, ")
        assert failed.startswith("failed: 4 rows: boom")
    assert not (tmp_path / "manifest.parquet").exists()


def test_run_json_has_no_secret_of_the_places_of_prompts_and_output() -> None:
    job = JobConfig(
        prompts="https://user:a-password@host/p.parquet?sig=a-signature",
        output="s3://a-user:b-password@bucket/out",
        storage_options={"key": "an-access-key", "client_kwargs": {"aws_secret_access_key": "a-secret-key"}},
        device="simulated",
    )
    unknown: Any = None
    described = json.dumps(Job(job, unknown, unknown, None, None).describe())
    for secret in ("a-password", "a-signature", "b-password", "an-access-key", "a-secret-key"):
        assert secret not in described
    assert "host/p.parquet" in described
    assert "bucket/out" in described


def test_the_title_of_the_process_has_no_storage_options(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("setproctitle.setproctitle", titles.append)
    options = ["--storage-options={note: private}", "--prompts-storage-options", "{note: private}"]
    options += ["--prompts-storage-options.note=private", "--on-end", "private", "--on-end={url: private}"]
    monkeypatch.setattr(sys, "orig_argv", ["gaudi-batch", "run", *options])
    cli._hide_secrets()
    hidden = "'--storage-options=***' --prompts-storage-options '***' '--prompts-storage-options.note=***'"
    hidden += " --on-end '***' '--on-end=***'"
    assert titles == [f"gaudi-batch run {hidden}"]
