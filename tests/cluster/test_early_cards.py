"""Cards start while a run is planned, or while the records of one that is resumed are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import threadcards
from helpers import read_manifest
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table

from gaudi_batch import JobConfig, run
from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.messages import Ready
from gaudi_batch.cluster.connection import CardResources, attached
from gaudi_batch.driver.early import EarlyCards
from gaudi_batch.driver.opening import begin_run
from gaudi_batch.driver.places import Places
from gaudi_batch.driver.result import RunResult
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.job import resolve
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.storage.listing import Entry
from gaudi_batch.storage.store import Storage

ONE = CardResources("HPU", 1)
"""What a card takes of the cluster."""
LEFT = 2
"""Shards that are not committed, of 13."""


@pytest.fixture
def job(prompts: Path, tmp_path: Path) -> JobConfig:
    fields: dict[str, Any] = {"device": "simulated", "simulated": {"batch_seconds": 0.01}, "shard_size": 8, "cards": 2}
    return JobConfig(prompts=str(prompts), output=str(tmp_path / "out"), **fields)


@pytest.fixture
def resume(job: JobConfig, tmp_path: Path, cluster: str) -> Callable[..., RunResult]:
    """Goes on with a run of which some shards are committed."""
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patched:
        threadcards.put_in_place(patched)
        run(job, address=cluster)
    for manifest in sorted(output.glob("manifest/*.parquet"))[-LEFT:]:
        manifest.unlink()
    return lambda **named: run(job, address=cluster, **named)


class Started:
    """The processes that were started, and whether there are as many as shards to make."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.actors: list[tuple[int, Any]] = []
        self.enough = threading.Event()
        start = Places.start

        def noted(places: Places, number: int) -> Any:
            actor = start(places, number)
            self.actors.append((number, getattr(actor, "_actor_id", actor)))
            if len({number for number, _ in self.actors}) == LEFT:
                self.enough.set()
            return actor

        monkeypatch.setattr(Places, "start", noted)


def while_reading(monkeypatch: pytest.MonkeyPatch, during: Callable[[], None]) -> None:
    """Has something happen while the records of a resumed run are read."""
    refresh = Commits.refresh

    def refresh_meanwhile(commits: Commits, listed: Mapping[int, Entry] | None = None) -> None:
        if listed:
            during()
        refresh(commits, listed)

    monkeypatch.setattr(Commits, "refresh", refresh_meanwhile)


def test_cards_start_before_all_is_read_and_go_on_with_the_run(
    resume: Callable[..., RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch)
    early: list[tuple[int, Any]] = []

    def wait_for_cards() -> None:
        assert started.enough.wait(60), "no card starts before all is read"
        early.extend(started.actors)

    while_reading(monkeypatch, wait_for_cards)
    assert resume().exit_code == 0
    assert sorted(row["row"] for row in read_manifest(tmp_path / "out")) == list(range(100))
    assert sorted(number for number, _ in early) == [0, 1]
    assert set(started.actors) == set(early), "the driver takes the processes that are there"


@pytest.mark.usefixtures("thread_cards")
def test_cards_start_before_a_new_run_is_planned_and_go_on_with_it(
    job: JobConfig, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch)
    early: list[tuple[int, Any]] = []
    loaded = threading.Event()
    emit = Mailbox.emit

    def noted(mailbox: Mailbox, event: Any) -> int:
        if isinstance(event, Ready):
            loaded.set()
        return emit(mailbox, event)

    def begin_once_a_card_is_ready(*arguments: Any, **named: Any) -> Any:
        assert started.enough.wait(60), "no card starts before the run is planned"
        early.extend(started.actors)
        assert loaded.wait(60), "a card waits for the run to be planned"
        assert not (tmp_path / "out/run.json").exists()
        return begin_run(*arguments, **named)

    monkeypatch.setattr(Mailbox, "emit", noted)
    monkeypatch.setattr("gaudi_batch.driver.opening.begin_run", begin_once_a_card_is_ready)
    assert run(job, address=cluster).exit_code == 0
    assert sorted(row["row"] for row in read_manifest(tmp_path / "out")) == list(range(100))
    assert set(started.actors) == set(early), "the driver takes the processes that are there"


def raises(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.mark.usefixtures("thread_cards")
@pytest.mark.parametrize(
    ("error", "where"),
    [
        (StorageError("storage failed"), "while they are read"),
        (KeyboardInterrupt(), "while they are read"),
        (StorageError("storage failed"), "before the driver begins"),
    ],
)
def test_cards_that_started_early_are_given_back_if_the_run_ends(
    error: BaseException, where: str, resume: Callable[..., RunResult], cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch)

    def wait_for_cards() -> None:
        assert started.enough.wait(60)
        if where == "while they are read":
            raise error

    while_reading(monkeypatch, wait_for_cards)
    with attached(cluster):
        if where == "before the driver begins":
            monkeypatch.setattr("gaudi_batch.driver.drive.Timeline", raises(error))
        with pytest.raises(type(error)):
            resume()
        states = {group["state"] for group in placement_group_table().values()}
    assert started.actors
    assert states == {"REMOVED"}


@pytest.mark.usefixtures("thread_cards")
def test_cards_of_a_new_run_are_given_back_if_it_can_t_be_planned(
    job: JobConfig, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        assert started.enough.wait(60)
        raise InputError("it can't be planned")

    monkeypatch.setattr("gaudi_batch.driver.opening.begin_run", fail)
    with attached(cluster):
        with pytest.raises(InputError, match="it can't be planned"):
            run(job, address=cluster)
        states = {group["state"] for group in placement_group_table().values()}
    assert states == {"REMOVED"}


@pytest.mark.usefixtures("thread_cards")
def test_cards_that_have_started_are_given_back_before_others_start(
    job: JobConfig, cluster: str, tmp_path: Path
) -> None:
    """As where storage lists late what another driver has committed."""
    resolved = resolve(job)
    with attached(cluster), EarlyCards(resolved, Storage(str(tmp_path / "out")), "aaaaa", lambda: ONE) as cards:
        cards.start("first", 2, "anything")
        cards.start("second", 2, "anything")
        cards.settle()
        alive = groups_that_are_there()
        assert len(alive) <= 2
        taken = cards.take("second")
        assert taken.setup.run_id == "second"
        cards.give_back()
        assert groups_that_are_there() == alive
        taken.places.close()


def groups_that_are_there() -> set[str]:
    return {number for number, group in placement_group_table().items() if group["state"] != "REMOVED"}


@pytest.mark.usefixtures("thread_cards")
def test_no_card_starts_before_the_rows_shapes_are_read(
    cluster: str, write_prompts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be unreadable, and a job is refused before it costs a card anything."""
    prompts = write_prompts({"prompt": ["a", "b"], "width": [64, 128]})
    monkeypatch.setattr(EarlyCards, "start", raises(AssertionError("cards start before the shapes are read")))
    job = JobConfig(prompts=str(prompts), output=str(tmp_path / "out"), device="simulated")
    assert run(job, address=cluster).exit_code == 0


@pytest.mark.usefixtures("thread_cards")
def test_no_card_starts_early_for_a_run_that_another_driver_has_made_meanwhile(
    job: JobConfig, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = LeaseKeeper.take

    def take_after_another(keeper: LeaseKeeper, *arguments: Any) -> None:
        monkeypatch.setattr(LeaseKeeper, "take", take)
        assert run(job, address=cluster).exit_code == 0
        monkeypatch.setattr(EarlyCards, "start", raises(AssertionError("cards start for a run that is complete")))
        take(keeper, *arguments)

    monkeypatch.setattr(LeaseKeeper, "take", take_after_another)
    assert run(job, address=cluster).exit_code == 0


@pytest.mark.usefixtures("thread_cards")
def test_what_ray_can_t_do_early_is_tried_again(
    resume: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Places, "create_early", raises(RayError("no")))
    assert resume().exit_code == 0


@pytest.mark.usefixtures("thread_cards")
def test_a_run_that_is_repaired_starts_none_beside_the_cards_that_verify(
    resume: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EarlyCards, "start", raises(AssertionError("cards start before the images are verified")))
    assert resume(repair=True).exit_code == 0
