"""A cluster that grows and shrinks with the job: Ray's autoscaler, whose nodes are processes of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import read_manifest
from raynodes import RayCluster

AUTOSCALING = {
    "cluster_name": "fake",
    "max_workers": 3,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 1.0,
    "provider": {"type": "fake_multinode"},
    "auth": {"ssh_user": "ray"},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "gaudi": {"resources": {"CPU": 1, "HPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
}


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """A head without cards, and an autoscaler that may add three nodes with four each."""
    config = tmp_path / "autoscaling.json"
    config.write_text(json.dumps(AUTOSCALING))
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    # The provider's nodes look for the head at Ray's default port.
    options = ["--num-cpus", "2", "--autoscaling-config", str(config)]
    cluster = RayCluster(tmp_path / "c", options, system_config={}, port=6379)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def test_nodes_come_for_the_job_and_go_after_it(head: RayCluster, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.parquet", tmp_path / "out"
    pq.write_table(pa.table({"prompt": [f"prompt {row}" for row in range(400)]}), prompts)
    job = ("--device", "simulated", "--shard-size", "8", "--simulated.batch-seconds", "4", "--max-cards", "8")
    command = ("run", "--address", head.address, "--prompts", prompts, "--output", output, *job)
    log = (tmp_path / "log").open("w+")
    driver = subprocess.Popen([sys.executable, "-m", "gaudi_batch", *map(str, command)], stderr=log)
    began, seen = time.monotonic(), []
    while not seen or driver.poll() is None or seen[-1][1] > 0:
        assert time.monotonic() - began < 200, seen
        cards = sum(node["Resources"].get("HPU", 0) for node in head.alive())
        if not seen or seen[-1][1] != cards:
            seen.append((round(time.monotonic() - began), cards))
        time.sleep(1)
    log.seek(0)
    assert driver.returncode == 0, log.read()
    print("seconds and cards:", seen)
    assert seen[0][1] == 0
    assert max(cards for _, cards in seen) == 8, "as many nodes as --max-cards needs, and no more"
    assert sorted(row["row"] for row in read_manifest(output)) == list(range(400))
    assert len({row["card"] for row in read_manifest(output)}) == 8
