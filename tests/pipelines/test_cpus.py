"""The CPUs that a process may use: as many as affinity, cgroup and its share of the node allow."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from helpers import several_cpus

from gaudi_batch.pipelines.cpus import share_of_node, usable_cpus

COUNT = "from gaudi_batch.pipelines.cpus import usable_cpus; print(usable_cpus())"


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
    check = (
        "check",
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
        "--cards",
        "1",
        "--model",
        "builtin:shapes",
    )
    command = ["taskset", "-c", one, sys.executable, "-m", "gaudi_batch", *map(str, check)]
    assert "1 threads a card" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_node_that_gives_less_than_a_card_has_threads_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "here", "Resources": {"HPU": 0.5}}])
    assert share_of_node() == usable_cpus()
