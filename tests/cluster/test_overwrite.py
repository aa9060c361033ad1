"""A run is removed for a new one only when the new one can be made; nothing else is begun without a card either."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from helpers import command_line, files, read_manifest
from ray.util.placement_group import remove_placement_group
from raynodes import RayCluster

from gaudi_batch import InputError, JobConfig, RunResult, RunStopped, run
from gaudi_batch.cluster.connection import CardResources, attached
from gaudi_batch.cluster.placement import node_of
from gaudi_batch.driver.trial import _occupy
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.storage.store import Storage

pytestmark = pytest.mark.usefixtures("thread_cards")

NO_CARD: dict[str, Any] = {"device": "cpu", "cpu": {"threads": 4096}, "model": "builtin:shapes"}
"""A job for which no machine has a card."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    """A finished run with one failed row, for each test to copy."""
    home = tmp_path_factory.mktemp("finished")
    pq.write_table(pa.table({"prompt": ["p"] * 40}), home / "prompts.parquet")
    make(home / "prompts.parquet", home / "out", cluster, simulated={"batch_seconds": 0.0, "raise_rows": [5]})
    return home


@pytest.fixture
def prompts(finished: Path) -> Path:
    return finished / "prompts.parquet"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


def make(prompts: Path, output: Path, address: str | None, *, flags: tuple[str, ...] = (), **fields: Any) -> RunResult:
    fields = {"device": "simulated", "simulated": {"batch_seconds": 0.0}, "shard_size": 16, "cards": 2} | fields
    job = JobConfig(prompts=str(prompts), output=str(output), **fields)
    return run(job, address=address, **dict.fromkeys(flags, True))


def test_a_run_is_not_removed_for_cards_whose_stack_is_not_here(prompts: Path, output: Path, cluster: str) -> None:
    before = files(output)
    job = ("run", "--prompts", prompts, "--output", output, "--model", "builtin:shapes", "--device", "hpu")
    refused = command_line(*job, "--overwrite")
    assert files(output) == before
    assert refused.returncode == 2
    assert "habana_frameworks is not installed here" in refused.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (NO_CARD, "the cluster has no card for this job"),
        ({"simulated": {"unloadable_modules": [0, 1, 2, 3]}}, "of 4 cards that were free none could load the model"),
        pytest.param(
            {"simulated": {"load_seconds": 600}, "limits": {"loading": 1}},
            "of 4 cards that were free none",
            marks=pytest.mark.thorough,
        ),
        ({"device": "hpu", "model": "builtin:shapes"}, "habana_frameworks"),
    ],
    ids=["no card", "can't load", "loads for ever", "no stack in the cluster"],
)
def test_a_run_is_not_removed_before_a_card_can_be_had(
    fields: dict[str, Any], message: str, prompts: Path, output: Path, cluster: str
) -> None:
    before = files(output)
    with pytest.raises((InputError, RunStopped)) as refused:
        make(prompts, output, cluster, flags=("overwrite",), seed=2, **fields)
    assert files(output) == before
    assert message in str(refused.value)


def test_one_good_card_is_enough_to_start_a_run_afresh(prompts: Path, output: Path, cluster: str) -> None:
    bad = {"batch_seconds": 0.0, "unloadable_modules": [0, 1, 2]}
    assert make(prompts, output, cluster, flags=("overwrite",), seed=2, simulated=bad).exit_code == 0
    assert json.loads((output / "run.json").read_text())["job"]["seed"] == 2


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of two nodes with four cards each."""
    node = ("--num-cpus=1", '--resources={"HPU": 4}')
    cluster = RayCluster(tmp_path / "cluster", node)
    try:
        cluster.start().add(*node)
        yield cluster.address
    finally:
        cluster.stop()


def test_a_bad_node_is_not_tried_card_after_card_while_another_has_some(two_nodes: str) -> None:
    with attached(two_nodes):
        nodes = [str(node["NodeID"]) for node in ray.nodes()]
        for bad, other in (nodes, nodes[::-1], nodes):
            group = _occupy(CardResources("HPU", 1), "trial", Counter({bad: 1}))
            assert group.wait(60)
            assert node_of(group) == other
            remove_placement_group(group)


def test_a_run_is_not_removed_for_prompts_that_can_not_be_planned(
    write_prompts: Callable[..., Path], prompts: Path, output: Path, cluster: str
) -> None:
    before = files(output)
    others = write_prompts({"width": [64 + 8 * (n % 5) for n in range(90)], "prompt": ["p"] * 90}, name="others")
    path = others / "part-0.parquet"
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[column.dictionary_page_offset : column.dictionary_page_offset + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="can't be decoded"):
        make(others, output, cluster, flags=("overwrite",))
    assert files(output) == before


def test_a_run_that_another_drives_is_not_removed(prompts: Path, output: Path, cluster: str) -> None:
    before = files(output)
    other = LeaseKeeper(Storage(str(output)), "other")
    other.take()
    try:
        with pytest.raises(InputError, match="drives this run"):
            make(prompts, output, cluster, flags=("overwrite",))
    finally:
        other.release()
    assert files(output) == before


def test_a_run_is_begun_only_with_a_card(prompts: Path, tmp_path: Path, cluster: str) -> None:
    with pytest.raises(InputError, match="no card"):
        make(prompts, tmp_path / "new", cluster, **NO_CARD)
    assert files(tmp_path / "new") == {}


@pytest.mark.parametrize("flag", ["repair", "retry_failed"])
def test_rows_are_planned_again_only_with_a_card(flag: str, prompts: Path, output: Path, cluster: str) -> None:
    (output / next(row["path"] for row in read_manifest(output) if row["row"] == 7)).unlink()
    before = files(output)
    with pytest.raises(InputError, match="no Ray cluster answers"):
        make(prompts, output, "127.0.0.1:1", flags=(flag,))
    assert files(output) == before
    assert command_line("status", output).stdout.startswith(f"{output}: complete with failed rows\n")
