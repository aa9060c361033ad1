"""Cards of a run that is resumed start while its records are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import read_manifest
from ray.util.placement_group import placement_group_table

from gaudi_batch import JobConfig, run
from gaudi_batch.cluster.connection import CardResources, attached
from gaudi_batch.driver.early import EarlyCards
from gaudi_batch.driver.places import Places
from gaudi_batch.driver.result import RunResult
from gaudi_batch.errors import StorageError
from gaudi_batch.output.commits import Commits
from gaudi_batch.storage.listing import Entry

pytestmark = pytest.mark.usefixtures("thread_cards")


@pytest.fixture
def resume(prompts: Path, tmp_path: Path, cluster: str) -> Callable[..., RunResult]:
    """Goes on with a run of 13 shards of which some are committed."""

    def resume(left: int = 3, **named: Any) -> RunResult:
        output = tmp_path / "out"
        fields: dict[str, Any] = {"device": "simulated", "simulated": {"batch_seconds": 0.01}, "shard_size": 8}
        job = JobConfig(prompts=str(prompts), output=str(output), **fields)
        run(job, address=cluster)
        for manifest in sorted(output.glob("manifest/*.parquet"))[-left:]:
            manifest.unlink()
        return run(job, address=cluster, **named)

    return resume


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots in which a process was started; a second run begins with none."""
    numbers: list[int] = []
    start = Places.start

    def noted(places: Places, number: int) -> Any:
        numbers.append(number)
        return start(places, number)

    monkeypatch.setattr(Places, "start", noted)
    return numbers


def reading(monkeypatch: pytest.MonkeyPatch, during: Callable[[], None]) -> None:
    """Has something happen while the records of a resumed run are read."""
    refresh = Commits.refresh

    def refresh_meanwhile(commits: Commits, listed: Mapping[int, Entry] | None = None) -> None:
        if listed:
            during()
        refresh(commits, listed)

    monkeypatch.setattr(Commits, "refresh", refresh_meanwhile)


def test_cards_start_before_all_is_read_and_go_on_with_the_run(
    resume: Callable[..., RunResult], started: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading ends when as many cards have started as there are shards to make."""
    enough = threading.Event()
    start = Places.start

    def until_enough(places: Places, number: int) -> Any:
        actor = start(places, number)
        if len(set(started)) == 2:
            enough.set()
        return actor

    early: list[int] = []

    def wait_for_cards() -> None:
        started.clear()
        enough.clear()
        assert enough.wait(60), "no card starts before all is read"
        early.extend(started)

    reading(monkeypatch, wait_for_cards)
    monkeypatch.setattr(Places, "start", until_enough)
    result = resume(left=2)
    assert result.exit_code == 0
    assert sorted(row["row"] for row in read_manifest(tmp_path / "out")) == list(range(100))
    assert sorted(early) == [0, 1], "two shards are left, so that a third is no hurry"
    assert len(result.summary["cards"]) == 4


def test_cards_that_started_early_are_given_back_if_the_records_can_t_be_read(
    resume: Callable[..., RunResult], started: list[int], cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    create = Places.create_early

    def noted(places: Places, numbers: Any) -> None:
        create(places, numbers)
        held.set()

    def fails() -> None:
        held.clear()
        assert held.wait(60)
        raise StorageError("storage failed")

    monkeypatch.setattr(Places, "create_early", noted)
    reading(monkeypatch, fails)
    with attached(cluster):
        with pytest.raises(StorageError, match="storage failed"):
            resume()
        states = {group["state"] for group in placement_group_table().values()}
    assert states == {"REMOVED"}


def test_cards_that_started_early_and_are_not_asked_for_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        id = None

    removed: list[Group] = []
    monkeypatch.setattr("gaudi_batch.driver.places.placement_group", lambda *_, **__: Group())
    monkeypatch.setattr("gaudi_batch.driver.places.remove_placement_group", removed.append)
    setup: Any = SimpleNamespace(job=SimpleNamespace(config=JobConfig(prompts="p", output="o", device="simulated")))
    places = Places(setup, CardResources("HPU", 1), "a")
    places.create_early(range(3))
    third = places._groups[2]
    places.create((0, 1))
    assert removed == [third]
    places.create((2, 3))
    assert sorted(places._groups) == [0, 1, 2, 3]
    assert removed == [third], "the first question alone settles it"


def test_a_run_that_is_repaired_starts_none_beside_the_cards_that_verify(
    resume: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("cards start before the images are verified")

    monkeypatch.setattr(EarlyCards, "_start", refused)
    assert resume(repair=True).exit_code == 0
