"""`ray up`, a job and `ray down` with the repository's cluster.yaml, on hosts that are namespaces of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray_up import what_is_missing

MISSING = what_is_missing()


@pytest.mark.thorough
@pytest.mark.skipif(MISSING is not None, reason=f"no cluster of namespaces here: {MISSING}")
@pytest.mark.timeout(300)
def test_ray_up_a_job_and_ray_down() -> None:
    script = Path(__file__).with_name("ray_up.py")
    played = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280, check=False)
    assert played.returncode == 0, played.stdout + played.stderr
    assert "every image once" in played.stdout
    assert "no process of Ray is left" in played.stdout
