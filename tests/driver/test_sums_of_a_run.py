"""What a run says at its end, from its manifests and its cards' slots."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Unfenced
from records import BUCKET, failed_manifest, no_cluster

from gaudi_batch.driver.finalize import sum_up
from gaudi_batch.driver.run_context import Ended, Run
from gaudi_batch.driver.slot import Slot
from gaudi_batch.errors import RunStopped
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.plan import Shard
from gaudi_batch.storage.store import Storage


def test_a_run_that_stops_says_why_rows_failed_and_a_row_made_again_counts_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("gaudi_batch"), "propagate", True)
    caplog.set_level(logging.INFO)
    storage = Storage(str(tmp_path))
    storage.put("manifest/000000.parquet", failed_manifest(0, dict.fromkeys(range(4), "boom")))
    storage.put("manifest/000001.parquet", failed_manifest(1, {2: "bang", 3: "bang"}))
    plan = [
        Shard(0, 0, 0, 4, BUCKET, 4, 4),
        Shard(1, 0, 2, 4, BUCKET, 2, 2, only=(2, 3), failed_before=2),
        Shard(2, 0, 0, 1, BUCKET, 1, 1, only=(0,), failed_before=1),
    ]
    job: Any = SimpleNamespace(
        dataset=SimpleNamespace(files=[SimpleNamespace(first_row=0)]),
        config=SimpleNamespace(format="files", price_per_card_hour=None, price_per_node_hour=None),
    )
    lease = LeaseKeeper(storage, "aaaaa")
    ledger, record = Ledger(storage, Unfenced()), RunInfo({}, {}, {}, "now", rows=4, images=4)
    with pytest.raises(RunStopped, match="too many"):
        sum_up(
            Run(job, ledger, lease, record, plan, no_cluster, Commits(ledger, "aaaaa")),
            CommitTotals(),
            Ended("too many failed"),
        )
    summary = ledger.get_json("summary.json") or {}
    assert summary["failures"] == [
        {"reason": "boom", "rows": 2, "first_ids": ["r0", "r1"]},
        {"reason": "bang", "rows": 2, "first_ids": ["r2", "r3"]},
    ], "the third shard, which makes a row again, is not committed"
    assert summary["failed_rows"] == 4
    assert "failed: 2 rows: boom (id r0, r1)" in caplog.messages


def test_a_card_is_held_from_when_the_cluster_gives_it_until_it_is_given_back() -> None:
    assert Slot(0, since=10.0).card_s(100.0) == 0.0
    assert Slot(0, since=10.0, placed=20.0).card_s(100.0) == 80.0
    assert Slot(0, since=10.0, placed=20.0, given_back=50.0).card_s(100.0) == 30.0
