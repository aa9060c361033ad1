"""A job that names no sizes keeps its cards at work to its end, on cards that hang and on more than it began with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import read_manifest, wait_until
from raynodes import follow

from gaudi_batch import JobConfig, run


def start(prompts: Path, output: Path, cluster: str, cards: int, batch_seconds: float, *flags: str) -> Any:
    command = ["run", "--prompts", str(prompts), "--output", str(output), "--address", cluster, "--cards", str(cards)]
    command += ["--device", "simulated", f"--simulated.batch-seconds={batch_seconds}", *flags]
    return subprocess.Popen([sys.executable, "-m", "gaudi_batch", *command], stderr=subprocess.PIPE, text=True)


def rows(output: Path) -> list[int]:
    return sorted(row["row"] for row in read_manifest(output))


@pytest.mark.usefixtures("thread_cards", "cards_are_free")
def test_the_defaults_give_every_card_its_share(prompts: Path, tmp_path: Path, cluster: str) -> None:
    config = JobConfig(
        prompts=str(prompts), output=str(tmp_path / "out"), device="simulated", simulated={"batch_seconds": 1.5}
    )
    summary = run(config, address=cluster).summary
    assert len(pq.read_table(tmp_path / "out/plan.parquet")) == 13, "a shard for each batch of 100 images"
    images = [card["images"] for card in summary["cards"].values()]
    assert len(images) == 4
    assert max(images) <= 4 * 8, "no card has a batch more than its share"


@pytest.mark.thorough
@pytest.mark.parametrize("count", [16, 20])
def test_a_card_that_stands_still_in_the_last_batch_costs_no_limit(
    count: int, write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    """With 20 rows there is a third batch, which one of the two cards has in its queue."""
    prompts, output = write_prompts({"prompt": ["p"] * count}), tmp_path / "out"
    limits = ("--limits.batch", "3000", "--limits.first-batch", "3000", "--limits.answer", "3000")
    driver = start(prompts, output, cluster, 2, 16.0, *limits)

    def generating() -> list[int]:
        path = output / "progress.json"
        cards = json.loads(path.read_text())["cards"].values() if path.exists() else ()
        return [card["pid"] for card in cards if card["phase"] in ("first batch", "batch")]

    wait_until(lambda: len(generating()) == 2)
    os.kill(generating()[0], signal.SIGSTOP)
    _, log = driver.communicate(timeout=200)
    assert driver.returncode == 0, log
    assert "takes longer than it should" in log
    assert rows(output) == list(range(count))
    images = {path.name for path in (output / "images").glob("*/*")}
    assert len(images) == count, "nothing of the card that hung is left"


@pytest.mark.thorough
def test_a_run_that_is_resumed_on_more_cards_is_cut_for_them(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    driver = start(prompts, output, cluster, 1, 0.5, "--batch-size", "1")
    wait_until(lambda: len(list(output.glob("manifest/*"))) >= 2)
    driver.send_signal(signal.SIGTERM)
    driver.communicate(timeout=100)
    assert driver.returncode == 130
    before = {path.name: path.read_bytes() for path in output.glob("manifest/*")}
    again = start(prompts, output, cluster, 4, 0.05, "--batch-size", "1")
    line = follow(again, "are cut anew into")
    again.communicate(timeout=100)
    assert again.returncode == 0
    assert line
    assert rows(output) == list(range(100))
    assert {name: (output / "manifest" / name).read_bytes() for name in before} == before
    status = subprocess.run(
        [sys.executable, "-m", "gaudi_batch", "status", str(output), "--json"], capture_output=True, text=True
    )
    assert json.loads(status.stdout)["state"] == "complete"
