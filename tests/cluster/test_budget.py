"""A run stops within a shard a card of its budget or its deadline, and goes on to the same images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from helpers import called, read_manifest

from gaudi_batch import JobConfig, RunResult, RunStopped, run
from gaudi_batch.driver.places import Places
from gaudi_batch.driver.spending import Spending
from gaudi_batch.errors import InputError
from gaudi_batch.output.spans import Held
from gaudi_batch.scheduling.decisions import Assign
from gaudi_batch.scheduling.event_log import load
from gaudi_batch.scheduling.events import StopRequested

pytestmark = pytest.mark.usefixtures("thread_cards")

SHARDS, ROWS, CARDS = 20, 4, 2
END = datetime(2126, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def make(write_prompts: Callable[..., Path], output: Path, cluster: str) -> Callable[..., RunResult]:
    prompts = write_prompts({"prompt": [f"prompt {row}" for row in range(SHARDS * ROWS)]})

    def call(**fields: Any) -> RunResult:
        job = {"device": "simulated", "shard_size": ROWS, "batch_size": 2, "cards": CARDS, "output": str(output)}
        job |= {"simulated": {"batch_seconds": 0.02}, "prompts": str(prompts)}
        return run(JobConfig.model_validate(job | fields), address=cluster)

    return call


def committed(output: Path) -> int:
    return len(list(output.glob("manifest/*.parquet")))


def assigned_after_stop(output: Path) -> list[Assign]:
    """What cards got to make after the run was asked to stop."""
    _, entries = load((output / "events.bin").read_bytes())
    (stop,) = (number for number, entry in enumerate(entries) if isinstance(entry.event, StopRequested))
    return [decision for entry in entries[stop:] for decision in entry.decisions if isinstance(decision, Assign)]


def images(output: Path) -> dict[int, str]:
    return {row["row"]: row["sha256"] for row in read_manifest(output)}


@pytest.fixture
def at_limit(output: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Time and cost go by commits: both limits are reached with the third. Yields how many shards were committed when a
    driver saw that."""
    seen: list[int] = []
    examine = Spending.examine

    def noted(spending: Spending, held: Held) -> Any:
        reached = examine(spending, held)
        if reached is not None:
            seen.append(committed(output))
        return reached

    monkeypatch.setattr(Spending, "examine", noted)
    monkeypatch.setattr("gaudi_batch.driver.loop.LIMITS_INTERVAL_S", 0.02)
    hours = "gaudi_batch.driver.progress.held_of_cluster"
    monkeypatch.setattr(hours, lambda *_: Held(3600.0 * committed(output), 3600.0, CARDS, 1))
    late = lambda: END if committed(output) >= 3 else END - timedelta(hours=1)  # noqa: E731
    monkeypatch.setattr("gaudi_batch.driver.spending._now", late)
    yield seen
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("limit", "reason", "way_out"),
    [
        (
            {"price_per_card_hour": 2.0, "budget": 6.0},
            "the budget of 6 is reached at ",
            "the same command with a larger budget resumes",
        ),
        (
            {"deadline": "2126-01-01T00:00:00Z"},
            "the deadline, 2126-01-01T00:00:00Z, is reached",
            "the same command with a later deadline resumes",
        ),
    ],
)
def test_a_run_stops_at_a_limit_and_goes_on_to_the_same_images(
    limit: dict[str, Any],
    reason: str,
    way_out: str,
    make: Callable[..., RunResult],
    output: Path,
    at_limit: list[int],
    tmp_path: Path,
) -> None:
    with pytest.raises(RunStopped, match=f"stopped: {reason}.* rows are done; {way_out}") as stopped:
        make(**limit, simulated={"batch_seconds": 0.5})  # a shard takes far longer than a look at the limits
    assert stopped.value.exit_code == 1
    (seen,) = at_limit
    assert not assigned_after_stop(output)
    # A card has made a shard that is not committed yet, and has begun another.
    assert seen <= committed(output) <= seen + 2 * CARDS < SHARDS
    summary = json.loads((output / "summary.json").read_text())
    assert summary["state"] == "stopped"
    assert summary["reason"].startswith(reason)
    assert summary["rows"] == ROWS * committed(output), "what had begun is committed"
    assert summary["retries"] == 0
    assert stopped.value.summary == summary
    before = committed(output)
    with pytest.raises(RunStopped, match=f"stopped: {reason}"):
        make(**limit)
    assert committed(output) == before
    result = make(**{name: value for name, value in limit.items() if name.startswith("price")})
    assert result.exit_code == 0
    assert make(**limit).exit_code == 0, "nothing is left that a limit could stop"
    make(output=str(tmp_path / "plain"))
    assert images(output) == images(tmp_path / "plain")


def test_a_budget_that_is_used_up_starts_no_card(
    make: Callable[..., RunResult], output: Path, at_limit: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunStopped):
        make(price_per_card_hour=2.0, budget=6.0)
    before = committed(output)
    with monkeypatch.context() as patched:
        for name in ("create_early", "create", "start"):
            patched.setattr(Places, name, lambda *_: pytest.fail("a card is started"))
        with pytest.raises(RunStopped, match="the budget of 6 is reached at"):
            make(price_per_card_hour=2.0, budget=6.0)
    assert committed(output) == before
    spent = json.loads((output / "summary.json").read_text())["cost"]
    assert spent == pytest.approx(2.0 * before, abs=2.0 * CARDS), (
        "what the first driver held when it last wrote it down"
    )
    summary = make(price_per_card_hour=1.0, budget=1000.0).summary
    first, second = summary["drivers"]
    assert (first["cost"], second["cost"]) == (spent, second["card_s"] / 3600)
    assert summary["cost"] == pytest.approx(first["cost"] + second["cost"])
    assert summary["cost_per_image"] == pytest.approx(summary["cost"] / (SHARDS * ROWS), rel=0.001)
    status = called("status", output)
    assert f"cost     {summary['cost']:.2f}" in status.stdout.splitlines()


def test_a_deadline_that_is_over_is_refused_before_anything_is_written(
    make: Callable[..., RunResult], output: Path
) -> None:
    with pytest.raises(InputError, match="deadline: 2020-01-01T00:00:00Z is over"):
        make(deadline="2020-01-01T00:00:00Z")
    assert not output.exists()


def test_a_deadline_ends_a_run_that_waits_for_a_card(make: Callable[..., RunResult]) -> None:
    with pytest.raises(RunStopped, match="the deadline of 3s is reached"):
        make(deadline="3s", cards=1, min_cards=1, device="cpu", model="builtin:shapes", cpu={"threads": 1000})


@pytest.mark.processes
def test_a_card_that_hangs_does_not_keep_a_run_beyond_its_deadline(
    make: Callable[..., RunResult], output: Path, at_limit: list[int]
) -> None:
    hangs = {"batch_seconds": 0.02, "hang_rows": [3 * ROWS]}
    with pytest.raises(RunStopped, match=r"the deadline, .* is reached"):
        make(deadline="2126-01-01T00:00:00Z", cards=1, simulated=hangs, limits={"batch": 5.0, "first_batch": 30.0})
    assert (at_limit, committed(output)) == ([3], 3)
    (fault,) = json.loads((output / "progress.json").read_text())["faults"]
    assert "its batch took longer than 5 s (limits.batch)" in fault["what"]
