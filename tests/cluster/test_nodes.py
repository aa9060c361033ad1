"""Nodes that are lost and come back: what they had in hand is made elsewhere, and what they still write is no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import read_manifest, wait_for_commits
from raynodes import QUICK, RayCluster, add_cards


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayCluster]:
    """A head without cards."""
    cluster = RayCluster(tmp_path / "cluster", system_config=QUICK | {"health_check_timeout_ms": 1000})
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def test_a_card_taken_for_dead_that_comes_back_changes_nothing(
    nodes: RayCluster, prompts: Path, tmp_path: Path
) -> None:
    lost, _ = [add_cards(nodes, 1) for _ in range(2)]
    output = tmp_path / "out"
    command = (
        *("run", "--prompts", prompts, "--output", output, "--device", "simulated", "--address", nodes.address),
        *("--simulated.batch-seconds", "2", "--shard-size", "8", "--cards", "2"),
    )
    driver = subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *map(str, command)], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    wait_for_commits(output, 3)
    stopped = lost.processes()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        log = []
        assert driver.stderr is not None
        for line in driver.stderr:
            log.append(line)
            if "left with its node" in line:
                break
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    log.append(driver.stderr.read())
    assert driver.wait(timeout=120) == 0, log
    assert any("left with its node" in line for line in log), log
    rows = read_manifest(output)
    assert sorted(row["row"] for row in rows) == list(range(100))
    assert {row["status"] for row in rows} == {"ok"}
    stored = {str(path.relative_to(output)) for path in (output / "images").rglob("*.png")}
    assert stored == {row["path"] for row in rows}
