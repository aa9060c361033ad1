"""Jobs on a cluster of separate processes: nodes that are killed, added, drained, or not like the others."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import threadcards
from helpers import called, free_port, read_manifest, wait_until
from raynodes import RAY, RayCluster, add_cards, descendants, wait_for_card

from gaudi_batch import JobConfig
from gaudi_batch.cluster import devices
from gaudi_batch.cluster.devices import with_device
from gaudi_batch.errors import InputError

ROWS = 240

AUTOSCALING: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 4,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 1.0,
    # Its nodes share one address, run as soon as they are made, and have no other configuration.
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "auth": {"ssh_user": "ray"},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "head_node_type": "ray.head.default",  # which the provider takes for granted
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "gaudi": {"resources": {"CPU": 1, "HPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 4},
    },
}
"""For Ray's autoscaler, whose nodes here are processes of this machine."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    pq.write_table(pa.table({"prompt": [None if row == 13 else f"prompt {row}" for row in range(ROWS)]}), path)
    return path


def start_job(cluster: RayCluster, dataset: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    job = ("--device", "simulated", "--shard-size", "8", "--simulated.batch-seconds", "1")
    command = ("run", "--address", cluster.address, "--prompts", dataset, "--output", output, *job, *flags)
    return subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_progress(output: Path) -> None:
    """Waits until the driver has reported once more."""
    before = (output / "progress.json").stat().st_mtime_ns
    wait_until(lambda: (output / "progress.json").stat().st_mtime_ns > before)


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
    with pytest.MonkeyPatch.context() as patched:
        threadcards.put_in_place(patched)
        assert called("run", "--prompts", dataset, "--output", output, *job).returncode == 3
    return content(output)


def test_three_nodes_of_which_one_is_killed_and_another_joins(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    first, _, _ = (add_cards(nodes, cards) for cards in (2, 1, 1))
    nodes.wait_for(4)
    output = tmp_path / "out"
    driver = start_job(nodes, dataset, output, "--simulated.batch-seconds", "3", "--batch-size", "4")
    wait_until(lambda: commits(output) >= 4)
    first.kill()
    add_cards(nodes, 1)
    log = end(driver)
    assert content(output) == undisturbed
    assert log.count("left with its node") == 2, log
    ready = re.findall(r"card (\S+) \(node \S+, module (\d)\) is ready", log)
    assert sorted(module for _, module in ready) == ["0", "0", "0", "0", "1"], log
    assert len({name for name, _ in ready}) == 5
    assert "quarantined" not in log
    made = {row["card"] for row in read_manifest(output)}
    assert ready[4][0] in made, "the new node's card made nothing"


@pytest.mark.thorough
def test_a_node_that_announces_its_end_finishes_what_it_has_begun_and_gets_nothing_more(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    nodes.add("--num-cpus=1", '--resources={"HPU": 1, "spot": 1}')
    told, _ = (add_cards(nodes, 1) for _ in range(2))
    nodes.wait_for(4)
    output = tmp_path / "out"
    driver = start_job(nodes, dataset, output, "--simulated.batch-seconds", "1.5")
    wait_until(lambda: commits(output) >= 3)
    drain_spot_node(nodes)
    assert told.process is not None
    told.process.send_signal(signal.SIGTERM)
    log = end(driver)
    assert content(output) == undisturbed
    assert "died" not in log
    assert '"retries": 0' in (output / "summary.json").read_text()
    ends = "is released, as its node leaves|left with its node"
    left = {name: when for when, name in re.findall(rf"(\S+) card (\S+) \(.*\) (?:{ends})", log)}
    assert len(left) == 2, log
    finished = collections.defaultdict(list)
    for row in read_manifest(output):
        finished[row["card"]].append(row["finished_at"].timestamp())
    for name, when in left.items():
        gone = time.mktime(time.strptime(time.strftime("%F ") + when, "%Y-%m-%d %H:%M:%S"))
        assert max(finished[name]) < gone + 1
        assert len(finished[name]) < ROWS / 3


def drain_spot_node(nodes: RayCluster) -> None:
    """Announces the end of the node that has the resource `spot`."""
    spot = next(node["NodeID"] for node in nodes.alive() if "spot" in node["Resources"])
    reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
    drain = ("drain-node", "--node-id", spot, *reason, "--deadline-remaining-seconds", "120")
    subprocess.run([RAY, *drain, "--address", nodes.address], check=True, capture_output=True)


@pytest.mark.thorough
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
        of_module = sorted(span[1:] for span in spans if span[0] == module)
        for (_, stop, one), (start, _, other) in itertools.pairwise(of_module):
            assert one == other or start > stop - 2, f"module {module} was in two hands"


def test_a_node_that_does_not_see_the_output_makes_nothing(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Nor does one that sees another run in its place."""
    output = tmp_path / "shared" / "out"
    output.parent.mkdir()
    for old_run in ("", f"mkdir {output} && echo {{}} > {output}/run.json &&"):
        hidden = f'mount -t tmpfs none {output.parent} && {old_run} exec "$@"'
        add_cards(nodes, 1, wrapper=("unshare", "--mount", "sh", "-c", hidden, "sh"))
    add_cards(nodes, 1)
    nodes.wait_for(4)
    log = end(start_job(nodes, dataset, output, "--simulated.batch-seconds", "0.4"))
    assert content(output) == undisturbed
    refused = f"does not see this run in {output}; a local path must be on a file system that all nodes share"
    assert len(set(re.findall(rf"card (\d) RuntimeError: .*{re.escape(refused)}", log))) == 2, log
    assert len({row["card"] for row in read_manifest(output)}) == 1


@pytest.mark.thorough
def test_a_job_that_loses_all_its_nodes_goes_on_with_the_next(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """The first has a card that fails, too, whose place must not be taken along to the next node."""
    broken = add_cards(nodes, 1, HABANA_VISIBLE_MODULES="7")
    first = add_cards(nodes, 1)
    nodes.wait_for(3)
    output = tmp_path / "out"
    driver = start_job(nodes, dataset, output, "--simulated.unloadable-modules", "[7]")
    wait_until(lambda: commits(output) >= 6)
    first.kill()
    broken.kill()
    wait_until(lambda: len(nodes.alive()) == 1)
    wait_for_progress(output)
    assert driver.poll() is None
    add_cards(nodes, 2)
    log = end(driver)
    assert content(output) == undisturbed
    assert log.count("left with its node") == 2


@pytest.mark.thorough
def test_a_node_of_which_nothing_works_is_asked_for_again(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    add_cards(nodes, 2)
    nodes.wait_for(2)
    output = tmp_path / "out"
    bad = ("--simulated.unloadable-modules", "[0, 1]")
    driver = start_job(nodes, dataset, output, "--max-cards", "2", *bad, "--simulated.batch-seconds", "0.2")
    faults = output / "progress.json"
    wait_until(lambda: faults.exists() and faults.read_text().count('"quarantined"') >= 2)
    wait_for_progress(output)
    assert driver.poll() is None
    add_cards(nodes, 2, HABANA_VISIBLE_MODULES="6,7")
    assert end(driver).count("is quarantined") == 2
    assert content(output) == undisturbed


@pytest.mark.thorough
def test_a_node_that_is_drained_while_its_cards_load_gets_no_shard(
    nodes: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    both = [nodes.add("--num-cpus=1", '--resources={"HPU": 1, "spot": 1}'), add_cards(nodes, 1)]
    nodes.wait_for(3)
    output = tmp_path / "out"
    driver = start_job(nodes, dataset, output, "--simulated.load-seconds", "12", "--simulated.batch-seconds", "0.5")
    for node in both:
        wait_for_card(node)
    drain_spot_node(nodes)
    log = end(driver)
    assert content(output) == undisturbed
    assert "is released, as its node leaves" in log
    assert len({row["card"] for row in read_manifest(output)}) == 1


def test_nodes_that_can_t_say_what_cards_they_have_are_named_so(
    cluster: str, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JobConfig(prompts=str(dataset), output="out", model="builtin:shapes")

    def without_this_package() -> bool:
        raise ModuleNotFoundError("No module named 'gaudi_batch'")

    def silent() -> bool:
        time.sleep(60)
        return True

    for has_stack, seconds, message in (
        (without_this_package, 60, "No module named 'gaudi_batch'"),
        (silent, 3, "for 3 s"),
    ):
        monkeypatch.setattr(devices, "NODES_TIMEOUT_S", float(seconds))
        monkeypatch.setattr(devices, "_has_stack", has_stack)
        with pytest.raises(InputError, match=rf"device auto: .*{message}.*; name the device"):
            with_device(config, cluster)


@pytest.fixture
def autoscaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    """A head without cards, and an autoscaler that may add four nodes with four each."""
    port = free_port()
    provider = AUTOSCALING["provider"] | {"gcs_address": f"127.0.0.1:{port}"}
    config = tmp_path / "autoscaling.json"
    config.write_text(json.dumps(AUTOSCALING | {"provider": provider}))
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    monkeypatch.setenv("AUTOSCALER_HEARTBEAT_TIMEOUT_S", "15")
    options = ["--num-cpus", "2", "--autoscaling-config", str(config)]
    cluster = RayCluster(tmp_path / "cluster", options, port=port)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.mark.thorough
def test_nodes_come_for_the_job_and_go_after_it(
    autoscaled: RayCluster, dataset: Path, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    began, seen = time.monotonic(), [(0, 0)]

    def cards() -> int:
        nodes = {node["NodeID"]: int(node["Resources"].get("HPU", 0)) for node in autoscaled.alive()}
        if seen[-1][1] != (count := sum(nodes.values())):
            seen.append((round(time.monotonic() - began), count))
        return count

    output = tmp_path / "out"
    driver = start_job(autoscaled, dataset, output, "--simulated.batch-seconds", "8", "--max-cards", "8")
    wait_until(lambda: cards() == 8)
    lost = next(node["NodeID"] for node in autoscaled.alive() if "HPU" in node["Resources"])
    wait_until(lambda: commits(output) >= 4)
    kill_node(lost)
    while driver.poll() is None:
        cards()
        time.sleep(0.5)
    log = end(driver)
    wait_until(lambda: cards() == 0)
    print("seconds and cards:", seen)
    assert max(count for _, count in seen) <= 12, "one node for another, and none too many"
    assert content(output) == undisturbed
    assert log.count("left with its node") == 4, log
    assert "quarantined" not in log


def kill_node(node_id: str) -> None:
    """Ends a node's processes, as when a spot instance is taken back."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"RAY_OVERRIDE_NODE_ID_FOR_TESTING={node_id}".encode() in environment.read_bytes():
                for pid in reversed(descendants(int(environment.parent.name))):
                    os.kill(pid, signal.SIGKILL)
