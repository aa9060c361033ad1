"""What a run came to: its rates and its time say what they are, over cards that change and drivers that are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import command_line, read_manifest, wait_for_commits
from raynodes import RayCluster, add_cards

from gaudi_batch import JobConfig, run

pytestmark = pytest.mark.usefixtures("thread_cards")


def job(prompts: Path, output: Path, cluster: str, seconds: str = "0.2") -> tuple[str, ...]:
    fields = ("--shard-size", "8", "--cards", "1", "--device", "simulated", "--simulated.batch-seconds", seconds)
    return ("run", "--prompts", str(prompts), "--output", str(output), "--address", cluster, *fields)


def require_no_sum_of_cards_that_never_met(summary: dict[str, Any]) -> None:
    rates = [card["images_per_s"] for card in summary["cards"].values() if card["images_per_s"]]
    assert len(rates) == 2
    assert min(rates) - 0.001 <= summary["images_per_s"] <= max(rates) + 0.001


def modules_that_made(output: Path) -> set[int]:
    """The modules of the cards that have made a run's images so far."""
    lines = [line for file in (output / "throughput").rglob("*.jsonl") for line in file.read_text().splitlines()]
    return {json.loads(line)["module"] for line in lines}


def test_a_run_of_two_drivers_took_the_time_of_both(prompts: Path, tmp_path: Path, cluster: str) -> None:
    """The first is killed; the second has its card elsewhere."""
    output = tmp_path / "out"
    began = time.monotonic()
    driver = subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *job(prompts, output, cluster, "1")], stderr=subprocess.DEVNULL
    )
    wait_for_commits(output, 4)
    (module,) = modules_that_made(output)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    at_most = time.monotonic() - began
    # The card of the killed driver is free once Ray has noticed.
    waits = ("--min-cards", "1", "--simulated.unloadable-modules", f"[{module}]")
    second = command_line(*job(prompts, output, cluster), *waits)
    assert second.returncode == 0, second.stderr

    summary = json.loads((output / "summary.json").read_text())
    require_no_sum_of_cards_that_never_met(summary)
    killed, last = summary["drivers"]
    assert 0 < killed["wall_s"] <= at_most
    assert last["wall_s"] > 0
    assert 0 <= killed["card_s"] < killed["wall_s"], "it held one card, up to when it last wrote that down"
    assert 3600 * summary["card_hours"] == pytest.approx(killed["card_s"] + last["card_s"], abs=0.5)
    assert summary["wall_s"] == pytest.approx(killed["wall_s"] + last["wall_s"])
    assert summary["images_per_s_wall"] == pytest.approx(100 / summary["wall_s"], rel=0.001)
    times = [datetime.fromisoformat(span[name]) for span in (killed, last) for name in ("started_at", "ended_at")]
    assert times == sorted(times)
    assert f"in 2 drivers: {summary['images_per_s_wall']:.2f} images/s" in second.stdout
    assert {row["path"][14:19] for row in read_manifest(output)} == {killed["driver"], last["driver"]}
    command_line(*job(prompts, output, cluster), "--verify")
    again = json.loads((output / "summary.json").read_text())
    assert again["drivers"] == summary["drivers"], "a driver that makes nothing adds nothing to the time"


@pytest.mark.thorough
def test_a_card_that_takes_the_place_of_one_that_is_lost_does_not_add_to_the_rate(
    nodes: RayCluster, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    lost = add_cards(nodes, 1)
    driver = subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *job(prompts, output, nodes.address, "0.5")], stderr=subprocess.DEVNULL
    )
    wait_for_commits(output, 4)
    lost.kill()
    add_cards(nodes, 1)
    assert driver.wait(timeout=120) == 0
    require_no_sum_of_cards_that_never_met(json.loads((output / "summary.json").read_text()))


WRONG_CLOCK = """
import datetime, sys, time
right, late = time.time, 3600.0
time.time = lambda: right() + late
class Late(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(right() + late, tz)
datetime.datetime = Late
"""


@pytest.mark.thorough
def test_when_a_shard_was_made_is_known_by_the_drivers_clock(nodes: RayCluster, prompts: Path, tmp_path: Path) -> None:
    """The clock of the node is an hour fast for all Python on it."""
    output, site = tmp_path / "out", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(WRONG_CLOCK)
    add_cards(nodes, 1, PYTHONPATH=str(site))
    began = time.time()
    result = command_line(*job(prompts, output, nodes.address))
    ended = time.time()
    assert result.returncode == 0, result.stderr
    paths = list(output.glob("manifest/*.parquet"))
    assert min(row["finished_at"].timestamp() for row in read_manifest(output)) > ended + 1800, "the clock is wrong"
    times = [json.loads(pq.read_schema(path).metadata[b"gaudi_batch"]).get("finished_at") for path in paths]
    assert all(moment is not None and began <= moment <= ended for moment in times), times


@pytest.mark.parametrize(
    "drivers", [None, pytest.param("nonsense", marks=pytest.mark.thorough), [{"driver": "aaaaa", "wall_s": -1}]]
)
def test_a_run_that_older_code_began_has_no_wall_time(
    drivers: Any, prompts: Path, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    config = JobConfig(
        prompts=str(prompts), output=str(output), device="simulated", simulated={"batch_seconds": 0.0}, shard_size=50
    )
    run(config, address=cluster)
    for name in ("progress.json", "summary.json"):
        record = json.loads((output / name).read_text())
        record.pop("drivers")
        (output / name).write_text(json.dumps(record | ({} if drivers is None else {"drivers": drivers})))
    (output / "manifest/000001.parquet").unlink()
    summary = run(config, address=cluster).summary
    assert (summary["wall_s"], summary["images_per_s_wall"]) == (None, None)
    assert len(summary["drivers"]) == 1, "that of now"
    assert summary["images_per_s"] is None or summary["images_per_s"] > 0
