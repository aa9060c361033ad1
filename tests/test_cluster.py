"""Jobs on a cluster of separate processes: nodes that are killed, added, drained, or not like the others."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import read_manifest
from raynodes import RAY, RayCluster

ROWS = 240


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[RayCluster]:
    """A head without cards."""
    cluster = RayCluster(tmp_path / "cluster")
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [None if row == 13 else f"prompt {row}" for row in range(ROWS)]}), path)
    return path


def add_cards(cluster: RayCluster, cards: int, **options: Any) -> Any:
    return cluster.add("--num-cpus=1", f'--resources={{"HPU": {cards}}}', **options)


def start_job(cluster: RayCluster, dataset: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    job = ("--device", "simulated", "--shard-size", "8", "--simulated.batch-seconds", "1")
    command = ("run", "--address", cluster.address, "--prompts", dataset, "--output", output, *job, *flags)
    return subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], Any], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def end(driver: subprocess.Popen[str], code: int = 3) -> str:
    """Waits for a job's end and returns its log."""
    _, log = driver.communicate(timeout=200)
    assert driver.returncode == code, log
    return log


def commits(output: Path) -> int:
    return len(list(output.glob("manifest/*.parquet")))


def content(output: Path) -> list[tuple[Any, ...]]:
    """What a manifest says but for who made it and when."""
    return sorted((row["row"], row["image_index"], row["status"], row["sha256"]) for row in read_manifest(output))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The content of the same job on one node."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    job = ("--device", "simulated", "--shard-size", "50", "--simulated.batch-seconds", "0.1", "--address", cluster)
    command = [sys.executable, "-m", "gaudi_batch", "run", "--prompts", dataset, "--output", output, *job]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 3
    return content(output)


def test_three_nodes_of_four_cards_of_which_one_is_killed_and_another_joins(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    first, _, _ = (add_cards(nodes, 4) for _ in range(3))
    nodes.wait_for(4)
    output = tmp_path / "out"
    driver = start_job(nodes, dataset, output, "--simulated.batch-seconds", "4", "--batch-size", "4")
    wait_until(lambda: commits(output) >= 10)
    first.kill()
    add_cards(nodes, 4)
    log = end(driver)
    assert content(output) == undisturbed
    assert log.count("left with its node") == 4, log
    ready = re.findall(r"card (\S+) \(node \S+, module (\d)\) is ready", log)
    assert sorted(module for _, module in ready) == sorted("0123" * 4), log
    assert len({name for name, _ in ready}) == 16
    assert "quarantined" not in log
    made = {row["card"] for row in read_manifest(output)}
    assert made & {name for name, _ in ready[12:]}, "the new node's cards made nothing"


def test_a_node_that_is_drained_finishes_what_it_has_begun_and_gets_nothing_more(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    add_cards(nodes, 1)
    add_cards(nodes, 1)
    nodes.wait_for(3)
    output = tmp_path / "out"
    driver = start_job(nodes, dataset, output, "--simulated.batch-seconds", "0.5")
    wait_until(lambda: commits(output) >= 6)
    leaving = next(node["NodeID"] for node in nodes.alive() if "HPU" in node["Resources"])
    reason = (
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds=120",
    )
    drain = [RAY, "drain-node", "--address", nodes.address, "--node-id", leaving, *reason]
    subprocess.run(drain, check=True, capture_output=True)
    log = end(driver)
    assert content(output) == undisturbed
    (name,) = re.findall(r"card (\S+) \(.*\) is released, as its node leaves", log)
    assert "died" not in log
    summary = (output / "summary.json").read_text()
    assert '"retries": 0' in summary
    released = time.mktime(time.strptime(time.strftime("%F ") + _time_of("is released", log), "%Y-%m-%d %H:%M:%S"))
    finished = [row["finished_at"].timestamp() for row in read_manifest(output) if row["card"] == name]
    assert max(finished) < released + 1
    assert len(finished) < ROWS / 2


def _time_of(what: str, log: str) -> str:
    return next(line for line in log.splitlines() if what in line)[:8]


def test_two_jobs_share_a_cluster_and_take_turns(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    add_cards(nodes, 4)
    nodes.wait_for(2)
    outputs = [tmp_path / name for name in ("one", "two", "three")]
    drivers = [
        start_job(nodes, dataset, outputs[0], "--cards", "2"),
        start_job(nodes, dataset, outputs[1]),
        start_job(nodes, dataset, outputs[2]),
    ]
    for driver in drivers:
        end(driver)
    for output in outputs:
        assert content(output) == undisturbed
    assert len({row["card"] for row in read_manifest(outputs[0])}) <= 2
    spans = []
    for output in outputs:
        for path in output.glob("throughput/*/*.jsonl"):
            for line in map(json.loads, path.read_text().splitlines()):
                stop = time.mktime(time.strptime(line["time"][:19], "%Y-%m-%dT%H:%M:%S"))
                spans.append((line["module"], stop - line["generate_s"], stop, str(output)))
    for module in {span[0] for span in spans}:
        mine = sorted(span[1:] for span in spans if span[0] == module)
        for (_, stop, one), (start, _, other) in itertools.pairwise(mine):
            assert one == other or start > stop - 2, f"module {module} was in two hands"


def test_a_node_that_does_not_see_the_output_makes_nothing(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    output = tmp_path / "shared" / "out"
    output.parent.mkdir()
    hidden = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {output.parent} && exec "$@"', "sh")
    add_cards(nodes, 1, wrapper=hidden)
    add_cards(nodes, 1)
    nodes.wait_for(3)
    log = end(start_job(nodes, dataset, output, "--simulated.batch-seconds", "0.2"))
    assert content(output) == undisturbed
    assert f"does not see the run in {output}; a local path must be on a file system that all nodes share" in log
    assert log.count("is quarantined") == 1
