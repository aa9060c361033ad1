"""A short job under fire, in a cluster of its own; see benchmarks/chaos.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

CHAOS = REPOSITORY / "benchmarks/chaos.py"


@pytest.mark.thorough
def test_nothing_is_lost_or_made_twice_under_fire(tmp_path: Path) -> None:
    size = ("--images=112", "--cards=4", "--bad-rows=2", "--node-rows=0", "--batch-seconds=0.1", "--limit=4")
    kinds = ("kill node", "read-only node", "slow reads", "kill card", "kill driver", "500")
    fire = ("--faults=6", "--lying-share=0.1", "--seed=3", *(f"--only={kind}" for kind in kinds))
    command = [sys.executable, str(CHAOS), "--s3", *size, *fire, "--home", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    info = json.loads(result.stdout)
    assert info["images"] + info["failed_rows"] == 112
    assert info["failed_rows"] == 2 + 8, "those that raise and kill, and a row group that kills whoever reads it"
    assert info["faults"].pop("lying card") == 1
    assert sum(info["faults"].values()) == 6
    assert info["faults"]["not fired, the run was over"] < 3
