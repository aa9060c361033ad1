"""Threads of a card: as many as its own node may use, and on the CPU, where images depend on them, the same on all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers import TESTS, called, read_manifest, several_cpus
from raynodes import RayCluster, follow, start_job

from gaudi_batch.pipelines.cpus import usable_cpus

HALF_DONE = TESTS / "data/half_done/cpu"
BUILT_IN = ("--model", "builtin:shapes", "--steps", "2")


@pytest.mark.thorough
@several_cpus
@pytest.mark.torch
def test_a_gaudi_card_has_the_threads_of_its_own_node_and_not_of_the_head(
    nodes: RayCluster, prompts: Path, tmp_path: Path
) -> None:
    emulate = ("emulate", "--modules", "1", "--state", tmp_path / "machine", "--")
    nodes.add("--num-cpus=1", wrapper=[sys.executable, "-m", "gaudi_batch", *map(str, emulate)])
    head = ("taskset", "-c", str(min(os.sched_getaffinity(0))))
    job = (*BUILT_IN, "--limit", "8", "--device", "hpu")
    driver = start_job(nodes.address, prompts, tmp_path / "out", *job, wrapper=head)
    line = follow(driver, r"card \S+ \(.*\) is ready")
    _, log = driver.communicate(timeout=200)
    assert driver.returncode == 0, log
    assert f", with {usable_cpus()} threads" in line
    (stack,) = json.loads((tmp_path / "out/run.json").read_text())["stacks"]
    assert stack["device"] == "hpu GAUDI2 (emulated)"
    assert stack.keys() >= {"torch", "diffusers", "transformers", "optimum-habana", "habana-torch-plugin"}


@several_cpus
@pytest.mark.torch
@pytest.mark.thorough
def test_a_node_that_may_use_fewer_cpus_than_a_card_has_threads_is_refused_by_name(
    nodes: RayCluster, prompts: Path, tmp_path: Path
) -> None:
    one = min(os.sched_getaffinity(0))
    small = ("unshare", "--uts", "taskset", "-c", str(one), "sh", "-c", 'hostname small-node; exec "$@"', "sh")
    nodes.add("--num-cpus=2", wrapper=small)  # which is not true
    job = (*BUILT_IN, "--limit", "8", "--device", "cpu", "--cpu.threads", "2", "--max-cards", "2")
    driver = start_job(nodes.address, prompts, tmp_path / "out", *job)
    line = follow(driver, "is quarantined")
    nodes.add("--num-cpus=2")
    _, log = driver.communicate(timeout=200)
    assert driver.returncode == 0, log
    assert "is quarantined: node small-node may use 1 CPUs (affinity, cgroup), and a card of this run has 2" in line
    assert len(read_manifest(tmp_path / "out")) == 8
    assert not list((tmp_path / "out").glob("throughput/small-node-*"))


@pytest.mark.thorough
@pytest.mark.torch
@pytest.mark.usefixtures("thread_cards")
def test_a_run_whose_threads_an_older_version_fixed_goes_on_with_as_many(tmp_path: Path, cluster: str) -> None:
    """That counted the machine's CPUs, of which a container may have fewer."""
    shutil.copytree(HALF_DONE, tmp_path / "run")
    os.utime(tmp_path / "run/prompts/part-0.parquet", (1_700_000_000, 1_700_000_000))
    path, threads = tmp_path / "run/output/run.json", usable_cpus() + 1
    record = json.loads(path.read_text())
    record["fingerprint"]["threads"] = threads
    path.write_text(json.dumps(record))
    places = ("--prompts", tmp_path / "run/prompts", "--output", tmp_path / "run/output")
    result = called("run", tmp_path / "run/job.yaml", *places, "--cards", "1", "--address", cluster)
    assert result.returncode == 0, result.stderr
    assert f", with {threads} threads" in result.stderr
    assert len(read_manifest(tmp_path / "run/output")) == 12
