"""Threads of a card: as many as its own node may use, and on the CPU, where images depend on them, the same on all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from helpers import TESTS, called, read_manifest
from raynodes import RayCluster, follow, start_job

from gaudi_batch.pipelines.cpus import share_of_node, usable_cpus

HALF_DONE = TESTS / "data/half_done/cpu"
COUNT = "from gaudi_batch.pipelines.cpus import usable_cpus; print(usable_cpus())"
BUILT_IN = ("--model", "builtin:shapes", "--steps", "2")
several_cpus = pytest.mark.skipif(usable_cpus() < 2, reason="this machine has one CPU")


def count(*wrapper: str) -> int:
    """The CPUs that a process may use, started by a command."""
    asked = subprocess.run([*wrapper, sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    return int(asked.stdout)


@contextlib.contextmanager
def cgroup_of_one_cpu() -> Iterator[Path]:
    """A cgroup with a quota of 1.5 CPUs; the test is left out where this process may make none."""
    old = Path("/sys/fs/cgroup/cpu").is_dir()
    group = Path("/sys/fs/cgroup/cpu" if old else "/sys/fs/cgroup") / f"gaudi-batch-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("cpu.cfs_quota_us" if old else "cpu.max")).write_text("150000")
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


@several_cpus
def test_cpus_that_a_process_is_kept_from_do_not_count() -> None:
    assert count("taskset", "-c", str(min(os.sched_getaffinity(0)))) == 1


@several_cpus
def test_cpus_that_its_cgroup_does_not_pay_for_do_not_count() -> None:
    with cgroup_of_one_cpu() as group:
        assert count("sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh") == 1


@several_cpus
@pytest.mark.parametrize(("limit", "cpus"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", usable_cpus())])
def test_the_quota_that_a_container_sees_counts(limit: str, cpus: int) -> None:
    """A container sees the limit of its own cgroup at the root of what is mounted there."""
    files = f'mount -t tmpfs none /sys/fs/cgroup; echo "{limit}" > /sys/fs/cgroup/cpu.max; exec "$@"'
    assert count("unshare", "--mount", "sh", "-c", files, "sh") == cpus


@several_cpus
def test_threads_follow_from_what_a_run_may_use(prompts: Path, tmp_path: Path) -> None:
    one = str(min(os.sched_getaffinity(0)))
    check = ("check", "--prompts", prompts, "--output", tmp_path / "out", "--device", "cpu", "--cards", "1", *BUILT_IN)
    command = ["taskset", "-c", one, sys.executable, "-m", "gaudi_batch", *map(str, check)]
    assert "1 threads a card" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


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


def test_a_node_that_gives_less_than_a_card_has_threads_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "here", "Resources": {"HPU": 0.5}}])
    assert share_of_node() == usable_cpus()
