"""The end of a run says what it came to: times, rates, why rows failed, and where everything lies."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Unfenced, called, read_manifest
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
    job: Any = SimpleNamespace(dataset=SimpleNamespace(files=[SimpleNamespace(first_row=0)]))
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


def flags(prompts: Path, output: Path, cluster: str, *more: str) -> tuple[str, ...]:
    job = ("--prompts", str(prompts), "--output", str(output), "--address", cluster, "--device", "simulated")
    return ("run", *job, "--simulated.batch-seconds", "0.05", "--batch-size", "8", "--cards", "1", *more)


@pytest.mark.usefixtures("thread_cards")
def test_the_summary_and_the_last_lines_agree_with_the_manifest(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    output, count = tmp_path / "out", 60
    prompts = write_prompts(
        {
            "id": [f"id {row}" for row in range(count)],
            "prompt": [None if row % 10 == 3 else f"prompt {row}" for row in range(count)],
            "width": [61 + row if row in (20, 21) else 64 for row in range(count)],
        }
    )
    began = datetime.now().astimezone().replace(microsecond=0)
    result = called(*flags(prompts, output, cluster))
    assert result.returncode == 3, result.stderr
    summary = json.loads((output / "summary.json").read_text())
    rows = read_manifest(output)

    failed = {row["id"]: row["error"] for row in rows if row["status"] == "failed"}
    assert len(failed) == 8
    groups = [(group["rows"], group["first_ids"]) for group in summary.get("failures", [])]
    assert groups == [(6, ["id 3", "id 13", "id 23", "id 33", "id 43"]), (2, ["id 20", "id 21"])]
    for group in summary["failures"]:
        reason = group["reason"].removesuffix(" (others differ in the values)")
        assert reason in (failed[group["first_ids"][0]], failed[group["first_ids"][-1]])
        assert f"failed: {group['rows']} rows: {group['reason']} (id {', '.join(group['first_ids'])}" in result.stdout

    start, end = (datetime.fromisoformat(summary[name]) for name in ("started_at", "ended_at"))
    assert began <= start <= end <= datetime.now().astimezone()
    assert f"from {summary['started_at']} to {summary['ended_at']}" in result.stdout
    busy = sum(card["generate_s"] for card in summary["cards"].values())
    assert busy < (summary["card_hours"] + 0.00005) * 3600 < summary["wall_s"] * 2, "it has four digits"
    assert summary["images_per_s_wall"] == pytest.approx(52 / summary["wall_s"], rel=0.001)
    (kind,) = summary["buckets"]
    assert (kind["width"], kind["images"]) == (64, 52)
    batches = [json.loads(line) for path in output.glob("throughput/*/*") for line in path.read_text().splitlines()]
    for name, phases in (("card_images_per_s", ["steady"]), ("card_images_per_s_with_warmup", ["steady", "warmup"])):
        counted = [batch for batch in batches if batch["phase"] in phases]
        rate = sum(batch["images"] for batch in counted) / sum(batch["generate_s"] for batch in counted)
        assert kind[name] == pytest.approx(rate, rel=0.01), name

    for name, path in summary["files"].items():
        assert re.search(rf"^{name}: +{output}/{path}$", result.stdout, re.MULTILINE)
        assert (output / path).exists()


@pytest.mark.usefixtures("thread_cards")
def test_a_trial_of_one_batch_has_a_rate(write_prompts: Callable[..., Path], tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    prompts = write_prompts({"prompt": [f"prompt {row}" for row in range(20)]})
    result = called(*flags(prompts, output, cluster, "--limit", "8", "--shard-size", "8"))
    assert result.returncode == 0, result.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary["images_per_s"] is None, "its first batch compiles"
    (line,) = (output / "throughput").glob("*/*.jsonl")
    batches = [json.loads(batch) for batch in line.read_text().splitlines()]
    assert {batch["phase"] for batch in batches} == {"warmup"}
    rate = 8 / sum(batch["generate_s"] for batch in batches)
    assert summary.get("images_per_s_with_warmup") == pytest.approx(rate, rel=0.001)
    assert [kind["card_images_per_s_with_warmup"] for kind in summary["buckets"]] == [pytest.approx(rate, rel=0.001)]
    assert "first batches alone, which compile" in result.stdout.splitlines()[0]
