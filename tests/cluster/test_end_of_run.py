"""The end of a run says what it came to: times, rates, why rows failed, and where everything lies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from helpers import called, read_manifest


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
