"""A model that comes from a hub: many cards and many nodes ask for it at the same moment, and it is fetched once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import command_line, read_manifest
from hub import COMMIT, Hub, hub_served
from raynodes import RayCluster

pytestmark = pytest.mark.torch
NODES = int(os.environ.get("GAUDI_BATCH_TEST_NODES", "2"))
CARDS = int(os.environ.get("GAUDI_BATCH_TEST_CARDS", "1"))
"""Of a node."""
ROWS = 24
PATIENT = {"HF_HUB_DOWNLOAD_TIMEOUT": "120"}
"""For the time that the hub waits for the other node."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_served() as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a large red circle on a blue background"] * ROWS}), path)
    return path


@pytest.mark.thorough
def test_nodes_and_cards_that_start_together_fetch_a_model_once(
    nodes: RayCluster, hub: Hub, prompts: Path, tmp_path: Path
) -> None:
    homes = [tmp_path / f"home-{number}" for number in range(NODES)]
    models = "hf/gaudi-batch"
    hub.ready = lambda: all((home / models / f"{COMMIT}.fetching").exists() for home in homes)
    for home in homes:
        nodes.add(f"--num-cpus={CARDS}", HOME=str(home), HF_HOME=str(home / "hf"), HF_ENDPOINT=hub.url, **PATIENT)
    nodes.wait_for(1 + NODES)
    job = ("--model", "tests/shapes", "--device", "cpu", "--cpu.threads", "1", "--steps", "2")
    cards = ("--cards", str(CARDS * NODES), "--min-cards", str(CARDS * NODES))
    result = command_line(
        *("run", "--prompts", prompts, "--output", tmp_path / "out", "--address", nodes.address),
        *(*job, *cards, "--batch-size", "1"),
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path / "driver"),
    )
    assert result.returncode == 0, result.stderr
    assert len(read_manifest(tmp_path / "out")) == ROWS
    assert json.loads((tmp_path / "out/run.json").read_text())["fingerprint"]["model_revision"] == COMMIT
    assert len(hub.weights()) == 3
    assert set(hub.weights().values()) == {1}
    from_hub = [home for home in homes if (home / models / f"{COMMIT}.hub").exists()]
    from_nodes = [home for home in homes if (home / models / COMMIT).is_dir()]
    assert hub.requests < 60, "a node that fetches alone, and the driver, ask 45 times"
    assert len(from_hub) == 1
    assert len(from_nodes) == NODES - 1
