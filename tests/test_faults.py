"""Nothing is lost, whatever breaks: each fault is a real one, on cards of a real Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import command_line, read_manifest

from gaudi_batch import JobConfig, RunResult, RunStopped, run

FAST = {"batch_seconds": 0.02}


def make(prompts: Path, output: Path, cluster: str, simulated: dict[str, Any], **fields: Any) -> RunResult:
    fields = {"shard_size": 16, "cards": 2} | fields
    config = JobConfig(
        prompts=str(prompts), output=str(output), device="simulated", simulated=FAST | simulated, **fields
    )
    return run(config, address=cluster)


def outcome(output: Path) -> tuple[list[int], dict[int, str]]:
    """Rows that were made, and those that failed with their errors."""
    rows = read_manifest(output)
    made = sorted(row["row"] for row in rows if row["status"] == "ok")
    return made, {row["row"]: row["error"] for row in rows if row["status"] == "failed"}


def test_a_row_that_kills_its_process_is_recorded_and_its_neighbours_are_made(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    result = make(prompts, tmp_path / "out", cluster, {"kill_rows": [37]})
    made, failed = outcome(tmp_path / "out")
    assert made == [row for row in range(100) if row != 37]
    assert "process died" in failed[37]
    assert sum(card["faults"] for card in result.summary["cards"].values()) == 3


def test_a_row_that_hangs_is_killed_at_the_limit_and_recorded(prompts: Path, tmp_path: Path, cluster: str) -> None:
    limits = {"batch": 2.0, "first_batch": 2.0}
    make(prompts, tmp_path / "out", cluster, {"hang_rows": [90]}, limits=limits)
    made, failed = outcome(tmp_path / "out")
    assert made == [row for row in range(100) if row != 90]
    assert "limits." in failed[90]


def test_a_card_that_always_fails_is_quarantined_and_costs_no_row(prompts: Path, tmp_path: Path, cluster: str) -> None:
    result = make(prompts, tmp_path / "out", cluster, {"broken_modules": [1]}, cards=3, shard_size=8)
    assert result.exit_code == 0
    assert outcome(tmp_path / "out") == (list(range(100)), {})
    cards = json.loads((tmp_path / "out/progress.json").read_text())["cards"].values()
    assert 1 in {card["module"] for card in cards}
    assert [card["images"] for card in result.summary["cards"].values() if card["module"] == 1] == [0]


def test_cards_that_can_not_load_stop_the_run_with_their_error(prompts: Path, tmp_path: Path, cluster: str) -> None:
    with pytest.raises(RunStopped, match="simulated failure to load on module"):
        make(prompts, tmp_path / "out", cluster, {"unloadable_modules": [0, 1, 2, 3]})


def start_driver(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def wait_for_commits(output: Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(list(output.glob("manifest/*.parquet"))) < count:
        assert time.monotonic() < until, "no commits"
        time.sleep(0.05)


def test_a_killed_driver_costs_nothing_that_was_committed(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    command = (
        *("run", "--prompts", prompts, "--output", output, "--device", "simulated", "--address", cluster),
        *("--simulated.batch-seconds", "0.3", "--shard-size", "8", "--cards", "2"),
    )
    driver = start_driver(*command)
    wait_for_commits(output, 5)
    driver.kill()
    driver.communicate()
    committed = {path: path.stat().st_mtime_ns for path in output.glob("manifest/*.parquet")}
    assert (output / "lease.json").exists()
    assert f"stopped (its driver, process {driver.pid} on" in command_line("status", output).stdout
    assert command_line(*command).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert outcome(output) == (list(range(100)), {})
    named = {row["path"] for row in read_manifest(output)}
    there = {str(path.relative_to(output)) for path in (output / "images").rglob("*.png")}
    assert there == named, "leavings of the killed driver"


def test_an_interrupted_run_commits_what_is_in_hand_and_can_be_resumed(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    command = (
        *("run", "--prompts", prompts, "--output", output, "--device", "simulated", "--address", cluster),
        *("--simulated.batch-seconds", "0.3", "--shard-size", "8", "--cards", "2"),
    )
    driver = start_driver(*command)
    wait_for_commits(output, 2)
    driver.send_signal(signal.SIGTERM)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    assert "the same command resumes" in said
    assert not (output / "lease.json").exists()
    assert len(list(output.glob("images/*"))) == len(list(output.glob("manifest/*.parquet")))
    assert command_line("status", output).stdout.startswith(f"{output}: stopped (interrupted)")
    assert command_line(*command).returncode == 0
    assert outcome(output) == (list(range(100)), {})


def test_a_second_driver_is_refused_while_the_first_lives(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    command = (
        *("run", "--prompts", prompts, "--output", output, "--device", "simulated", "--address", cluster),
        *("--simulated.batch-seconds", "0.3", "--shard-size", "8", "--cards", "2"),
    )
    driver = start_driver(*command, "--simulated.batch-seconds", "2")
    wait_for_commits(output, 1)
    second = command_line(*command)
    assert second.returncode == 2
    assert f"process {driver.pid}" in second.stderr
    driver.kill()
    driver.communicate()
