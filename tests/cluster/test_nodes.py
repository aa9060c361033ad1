"""Nodes that are lost and come back: what they had in hand is made elsewhere, and what they still write is no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import read_manifest
from ray.cluster_utils import Cluster

QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""How soon Ray takes a node that does not answer for dead; by its own settings after half a minute."""


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without cards and two nodes with one each."""
    small = {"object_store_memory": 100 * 1024**2, "num_cpus": 1}
    head = small | {"include_dashboard": False, "_system_config": QUICK | {"health_check_timeout_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(**small, resources={"HPU": 1})
        yield cluster
    finally:
        cluster.shutdown()


def processes_of(raylet: int) -> list[int]:
    """A raylet and its workers."""
    found = [raylet]
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == raylet:
                found.append(int(entry.name))
    return found


def test_a_card_taken_for_dead_that_comes_back_changes_nothing(nodes: Cluster, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = (
        *("run", "--prompts", prompts, "--output", output, "--device", "simulated", "--address", nodes.address),
        *("--simulated.batch-seconds", "1", "--shard-size", "8", "--cards", "2"),
    )
    driver = subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *map(str, command)], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    until = time.monotonic() + 120
    while len(list(output.glob("manifest/*.parquet"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    lost = processes_of(next(iter(nodes.worker_nodes)).all_processes["raylet"][0].process.pid)
    for pid in lost:
        os.kill(pid, signal.SIGSTOP)
    try:
        said = []
        assert driver.stderr is not None
        for line in driver.stderr:
            said.append(line)
            if "left with its node" in line:
                break
    finally:
        for pid in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    said.append(driver.stderr.read())
    assert driver.wait(timeout=120) == 0, said
    assert any("left with its node" in line for line in said), said
    rows = read_manifest(output)
    assert sorted(row["row"] for row in rows) == list(range(100))
    assert {row["status"] for row in rows} == {"ok"}
    there = {str(path.relative_to(output)) for path in (output / "images").rglob("*.png")}
    assert there == {row["path"] for row in rows}
