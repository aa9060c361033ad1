"""A short job under fire, in a cluster of its own; see benchmarks/chaos.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parent.parent / "benchmarks/chaos.py"


def test_nothing_is_lost_or_made_twice_under_fire(tmp_path: Path) -> None:
    size = ("--images=480", "--cards=3", "--faults=10", "--bad-rows=3", "--batch-seconds=0.1", "--limit=4")
    command = [sys.executable, CHAOS, "--s3", "--seed=3", *size, "--home", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    facts = json.loads(result.stdout)
    assert facts["images"] + facts["failed_rows"] == 480
    assert facts["failed_rows"] == 3
    assert sum(facts["faults"].values()) == 10
    assert facts["faults"]["not fired, the run was over"] < 4
