"""The end of a run says what it came to: times, rates, why rows failed, and where everything lies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from helpers import command_line, read_manifest


def flags(prompts: Path, output: Path, cluster: str, *more: str) -> tuple[str, ...]:
    job = ("--prompts", str(prompts), "--output", str(output), "--address", cluster, "--device", "simulated")
    return ("run", *job, "--simulated.batch-seconds", "0.05", "--batch-size", "8", "--cards", "2", *more)


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
    result = command_line(*flags(prompts, output, cluster))
    assert result.returncode == 3, result.stderr
    summary = json.loads((output / "summary.json").read_text())
    rows = read_manifest(output)

    failed = {row["id"]: row["error"] for row in rows if row["status"] == "failed"}
    assert len(failed) == 8
    said = [(group["rows"], group["first_ids"]) for group in summary.get("failures", [])]
    assert said == [(6, ["id 3", "id 13", "id 23", "id 33", "id 43"]), (2, ["id 20", "id 21"])]
    for group in summary["failures"]:
        assert group["reason"] in (failed[group["first_ids"][0]], failed[group["first_ids"][-1]])
        assert f"failed: {group['rows']} rows: {group['reason']} (id {', '.join(group['first_ids'])}" in result.stdout

    start, end = (datetime.fromisoformat(summary[name]) for name in ("started_at", "ended_at"))
    assert began <= start <= end <= datetime.now().astimezone()
    assert f"from {summary['started_at']} to {summary['ended_at']}" in result.stdout
    busy = sum(card["generate_s"] for card in summary["cards"].values())
    assert busy < summary["card_hours"] * 3600 < summary["wall_s"] * 2
    assert summary["images_per_s_wall"] == pytest.approx(52 / summary["wall_s"], rel=0.001)
    (kind,) = summary["buckets"]
    assert (kind["width"], kind["images"]) == (64, 52)
    assert kind["card_images_per_s"] > kind["card_images_per_s_with_warmup"] > 0

    for name, path in summary["files"].items():
        assert re.search(rf"^{name}: +{output}/{path}$", result.stdout, re.MULTILINE)
        assert (output / path).exists()


def test_a_trial_of_one_batch_has_a_rate(write_prompts: Callable[..., Path], tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    prompts = write_prompts({"prompt": [f"prompt {row}" for row in range(20)]})
    result = command_line(*flags(prompts, output, cluster, "--limit", "8", "--shard-size", "8"))
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
