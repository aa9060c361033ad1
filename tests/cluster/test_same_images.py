"""What shapes an image is the same on all cards of a run, or the card that differs is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import command_line
from raynodes import RayCluster, add_cards, follow, start_job, wait_for_card

from gaudi_batch.pipelines.sources import BUILTIN_MODELS

OTHER = "0.0.9"


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """More prompts than a test waits for."""
    pq.write_table(pa.table({"prompt": ["p"] * 4000}), tmp_path / "many.parquet")
    return tmp_path / "many.parquet"


def other_version(home: Path, package: str) -> str:
    """A PYTHONPATH on which a package has another version."""
    installed = home / "site" / f"{package}-{OTHER}.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {OTHER}\n")
    return str(installed.parent)


def stop(driver: subprocess.Popen[str]) -> None:
    """Interrupts a job and waits for its end."""
    driver.send_signal(signal.SIGTERM)
    _, log = driver.communicate(timeout=100)
    assert driver.returncode == 130, log


def stacks(output: Path) -> list[dict[str, str]]:
    stored: list[dict[str, str]] = json.loads((output / "run.json").read_text()).get("stacks", [])
    return stored


@pytest.mark.thorough
def test_a_node_with_another_version_makes_nothing_until_it_is_all_that_there_is(
    nodes: RayCluster, many: Path, tmp_path: Path
) -> None:
    """The first card's versions count; a driver whose cards all have others goes on, with a warning."""
    output, ready = tmp_path / "out", r"card \S+ \(.*\) is ready"
    job = ("--device", "simulated", "--simulated.batch-seconds", "0.2")
    good = add_cards(nodes, 1)
    driver = start_job(nodes.address, many, output, *job)
    assert follow(driver, ready)
    add_cards(nodes, 1, wrapper=("unshare", "--uts", "sh", "-c", 'hostname odd-node; exec "$@"', "sh"),
              PYTHONPATH=other_version(tmp_path, "gaudi_batch"))  # fmt: skip
    line = follow(driver, ready, "is quarantined")
    stop(driver)
    assert "is quarantined: node odd-node would make other images" in line
    ours = stacks(output)[0]["gaudi-batch"]
    assert f"gaudi-batch is {OTHER}, and {ours} in this run; every node needs the same" in line
    assert {row["node"] for row in json.loads((output / "summary.json").read_text())["cards"].values()} != {"odd-node"}
    assert not list(output.glob("throughput/odd-node-*"))
    assert len(stacks(output)) == 1

    good.kill()
    driver = start_job(nodes.address, many, output, *job)
    line = follow(driver, "images may differ")
    assert follow(driver, ready)
    while len(stacks(output)) < 2:
        assert driver.poll() is None
    stop(driver)
    assert f"gaudi-batch is {OTHER} on node odd-node and was {ours} before in this run" in line
    assert [stack["gaudi-batch"] for stack in stacks(output)] == [ours, OTHER]
    assert list(output.glob("throughput/odd-node-*"))


@pytest.mark.thorough
def test_an_odd_node_that_loads_first_costs_a_resumed_run_that_node_alone(
    nodes: RayCluster, many: Path, tmp_path: Path
) -> None:
    output, ready = tmp_path / "out", r"card \S+ \(.*\) is ready"
    job = ("--device", "simulated", "--simulated.batch-seconds", "0.2", "--simulated.load-seconds", "2")
    good = add_cards(nodes, 1)
    driver = start_job(nodes.address, many, output, *job)
    while not stacks_written(output):
        assert driver.poll() is None
    stop(driver)
    before = stacks(output)

    add_cards(nodes, 1, wrapper=("unshare", "--uts", "sh", "-c", 'hostname odd-node; exec "$@"', "sh"),
              PYTHONPATH=other_version(tmp_path, "gaudi_batch"))  # fmt: skip
    nodes.wait_for(3)
    driver = start_job(nodes.address, many, output, *job)
    slow = wait_for_card(good)
    os.kill(slow, signal.SIGSTOP)
    line = follow(driver, "waits for what the other cards have", ready)
    os.kill(slow, signal.SIGCONT)
    assert "odd-node" in line
    assert "is ready" not in line
    lines = [follow(driver, ready, "is quarantined") for _ in range(2)]
    works, refused = sorted(lines, key=lambda line: "is quarantined" in line)
    assert "is quarantined: node odd-node would make other images" in refused
    assert "is ready" in works
    stop(driver)
    assert stacks(output) == before
    assert not list(output.glob("throughput/odd-node-*"))


def stacks_written(output: Path) -> bool:
    return (output / "run.json").exists() and bool(stacks(output))


@pytest.mark.thorough
def test_a_head_with_other_versions_than_the_cards_warns_of_nothing(
    cluster: str, prompts: Path, tmp_path: Path
) -> None:
    job: tuple[str | Path, ...] = (
        "run",
        "--address",
        cluster,
        "--prompts",
        prompts,
        "--output",
        tmp_path / "out",
        "--device",
        "simulated",
    )
    job = (*job, "--simulated.batch-seconds", "0.01", "--shard-size", "8", "--cards", "1")
    assert command_line(*job, "--limit", "8").returncode == 0
    result = command_line(*job, PYTHONPATH=other_version(tmp_path, "diffusers"))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out/summary.json").read_text())["rows"] == 100
    assert "images may differ" not in result.stderr


@pytest.mark.thorough
@pytest.mark.torch
def test_a_node_with_another_model_at_the_same_path_makes_nothing(
    nodes: RayCluster, many: Path, tmp_path: Path
) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(BUILTIN_MODELS / "shapes", model)
    shutil.copytree(model, other)
    weights = next((other / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    hidden = ("unshare", "--mount", "--uts", "sh", "-c",
              f'hostname odd-node; mount --bind {other} {model} && exec "$@"', "sh")  # fmt: skip
    nodes.add("--num-cpus=1", wrapper=hidden)
    nodes.add("--num-cpus=1")
    output = tmp_path / "out"
    job = ("--model", str(model), "--device", "cpu", "--cpu.threads", "1", "--steps", "2", "--batch-size", "2")
    driver = start_job(nodes.address, many, output, *job)
    line = follow(driver, "is quarantined")
    while not stacks_written(output):
        assert driver.poll() is None
    stop(driver)
    assert re.search(
        rf"node odd-node would make other images: .*model {model} is \w{{12}}, and \w{{12}} in this run", line
    )
    assert not list(output.glob("throughput/odd-node-*"))
    assert stacks(output)[0].keys() >= {
        "torch",
        "diffusers",
        "transformers",
        "numpy",
        "pillow",
        "gaudi-batch",
        "device",
    }
