"""progress.json and the terminal say what the commits, the cards and the faults say."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from world import BUCKETS, RULES, loaded, shards

from gaudi_batch.card.messages import CardStatus, Ready
from gaudi_batch.card.readings import Readings
from gaudi_batch.card.work import CardWork
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.reasons import FailedRows
from gaudi_batch.driver.progress import FAULTS_KEPT, RunProgress
from gaudi_batch.driver.run_context import Committed
from gaudi_batch.driver.slot import Slot
from gaudi_batch.driver.spending import Spending
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.plan import Shard
from gaudi_batch.scheduling.events import CardPlaced
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts

ROWS = 4
HOT = Readings(watts=612.4, temperature_c=84, utilisation=0.97, memory_used_mb=61_000.0, throttled="thermal")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("gaudi_batch.driver.progress.time.monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last character of an attempt's name is the number of its shard."""
    monkeypatch.setattr(Schedule, "shard_of", lambda self, attempt: int(attempt[-1]))


@pytest.fixture
def run() -> RunProgress:
    return run_of(shards(3), CommitTotals())


def run_of(missing: list[Shard], totals: CommitTotals) -> RunProgress:
    no_ledger: Any = None
    return RunProgress(
        Schedule(missing, "a", RowCounts(3 * ROWS), RULES),
        Committed(totals, FailedRows({})),
        3 * ROWS,
        len(totals.attempts) * ROWS - totals.images,
        Spending(JobConfig(prompts="p", output="o", device="simulated", price_per_card_hour=36.0), "a"),
        Timeline(no_ledger, "a"),
    )


def card(number: int, images: int) -> Slot:
    ready = Ready("id", "host", number, 1, 0.5, {}, "", None, 1)
    slot = Slot(number, name=f"host-{number}", ready=ready, actor=object(), placed=0.0)
    slot.status = stored(images, attempt=f"aaaaa{number}")
    return slot


def stored(images: int, made: int | None = None, attempt: str = "aaaaa0") -> CardStatus:
    """Of a process that has stored so many images of an attempt, and so many in its life."""
    work = CardWork(images if made is None else made)
    return CardStatus("batch", 1.0, 0.0, images, work=work, images_of={attempt: images})


def commit(shard: int, images: int) -> CommitInfo:
    sums = ThroughputTotals(images=images, steady_images=images, steady_s=2.0)
    return CommitInfo(shard, f"aaaaa{shard}", "host-0", "host", 0, ROWS, ROWS - images, images, sums, "run")


def test_images_are_those_of_commits_and_those_that_cards_have_stored(run: RunProgress, clock: list[float]) -> None:
    run.committed(commit(0, ROWS), None)
    waits: dict[str, Any] = {}
    assert run.describe([card(0, 2), card(1, 1)], waits, None, "running")["images"] == ROWS + 3
    dead = card(2, 3)
    dead.actor = None
    assert run.describe([dead], waits, None, "running")["images"] == ROWS, (
        "what a dead process stored is named by no manifest"
    )


def test_an_image_that_a_backup_attempt_makes_too_is_not_two(run: RunProgress, clock: list[float]) -> None:
    for shard in (0, 1):
        run.committed(commit(shard, ROWS), None)
    cards = [card(2, ROWS - 2), card(22, ROWS - 1)]
    described = run.describe(cards, {}, None, "running")
    assert (described["images"], described["images_left"]) == (3 * ROWS - 1, 1)


def test_images_of_failed_rows_are_missing_from_the_total(run: RunProgress, clock: list[float]) -> None:
    run.committed(commit(0, ROWS - 1), None)
    run.committed(commit(1, ROWS), None)
    described = run.describe([], {}, None, "running")
    assert (described["images"], described["images_total"], described["images_missing"]) == (2 * ROWS - 1, 3 * ROWS, 1)


def test_rows_that_are_run_again_are_left_to_be_made(clock: list[float]) -> None:
    """Two rows that failed, and two whose images are torn."""
    totals = CommitTotals()
    for shard, images in enumerate((ROWS, ROWS - 2, ROWS)):
        totals.add(commit(shard, images))
    failed = Shard(3, 0, ROWS, ROWS + 2, BUCKETS[0], 2, 2, only=(ROWS, ROWS + 1), failed_before=2)
    torn = Shard(4, 0, 0, 2, BUCKETS[0], 2, 2, only=(0, 1), images_before=2)
    run = run_of([failed, torn], totals)
    first = run.describe([], {}, None, "running")
    assert (first["images"], first["images_left"], first["rows_again"]) == (3 * ROWS - 4, 4, 4)
    assert first["images_again"] == 2
    assert first["seconds_left"] is None, "no card has made any yet"
    slot = card(0, 2)
    begun = run.describe([slot], {}, None, "running")
    assert (begun["images"], begun["images_left"], begun["rows_again"]) == (3 * ROWS - 2, 2, 4)
    slot.status = stored(0, made=2)
    run.committed(replace(commit(4, 2), rows=2, failed_rows=0, images_before=2, again=True), None)
    again = run.describe([slot], {}, None, "running")
    assert (again["images"], again["images_left"], again["rows_again"]) == (3 * ROWS - 2, 2, 2)
    run.committed(replace(commit(3, 1), rows=2, failed_rows=1, failed_before=2, again=True), None)
    last = run.describe([slot], {}, None, "running")
    assert (last["images"], last["images_left"], last["rows_again"]) == (3 * ROWS - 1, 0, 0)
    assert (last["images_missing"], last["images_again"], last["seconds_left"]) == (1, 0, 0)


def test_the_rate_is_that_of_the_last_minute(run: RunProgress, clock: list[float]) -> None:
    rates = []
    for second in range(120):
        clock[0] = 1000.0 + second
        images = second if second < 60 else 60 + 2 * (second - 60)
        rates.append(run.describe([card(0, images)], {}, None, "running")["images_per_s"])
    assert rates[:3] == [None, None, None], "a rate of a moment says nothing"
    known = [rate for rate in rates if rate is not None]
    assert known[50] == pytest.approx(1.0)
    assert known[-1] == pytest.approx(2.0, abs=0.05)
    assert all(later >= before - 1e-9 for before, later in itertools.pairwise(known[60:]))


def test_a_rate_needs_no_image_that_is_not_committed_yet(run: RunProgress, clock: list[float]) -> None:
    """As where shards are committed as fast as they are stored."""
    slot = card(0, 0)
    for shard in range(3):
        slot.status = stored(0, made=shard * ROWS)
        run.committed(commit(shard, ROWS), None)
        rate = run.describe([slot], {}, None, "running")["images_per_s"]
        clock[0] += 4.0
    assert rate == 1.0


def test_what_a_fault_has_cost_is_left_to_be_made_at_the_rate_of_the_cards(
    run: RunProgress, clock: list[float]
) -> None:
    cards = [card(0, 0), card(1, 0)]
    for number in (0, 1):
        run._schedule.handle(CardPlaced(number, "node"))
        run._schedule.handle(loaded(number, "node"))
    for made in (0, 1, 2, 3):
        cards = [card(0, made), card(1, made)]
        clock[0] += 4.0
        before = run.describe(cards, {}, None, "running")
    assert (before["images_per_s"], before["images_left"], before["seconds_left"]) == (0.5, 6, 12)
    for made in (0, 1, 2):  # another process of the second card
        cards = [card(0, made), card(1, made)]
        clock[0] += 4.0
        described = run.describe(cards, {}, None, "running")
    assert described["images_per_s"] == pytest.approx(0.5, abs=0.15), "the cards are as fast as they were"
    assert described["images_left"] == 3 * ROWS - 4
    assert described["seconds_left"] == pytest.approx(2 * (3 * ROWS - 4), abs=6)


def test_the_latest_faults_are_kept_and_all_are_counted(run: RunProgress, clock: list[float]) -> None:
    slot = card(0, 0)
    run.introduce(slot)
    for number in range(FAULTS_KEPT + 5):
        run.fault(slot, f"fault {number}")
    described = run.describe([slot], {}, "a card", "running")
    assert [fault["what"] for fault in described["faults"]] == [f"fault {n}" for n in range(5, FAULTS_KEPT + 5)]
    assert described["cards"]["host-0"]["faults"] == FAULTS_KEPT + 5
    assert described["waits_for"] == "a card"


def test_the_hours_of_cards_go_on_until_their_place_is_given_back(run: RunProgress, clock: list[float]) -> None:
    held, returned, asked = card(0, 0), card(1, 0), Slot(2)
    held.placed, returned.placed, returned.given_back = 400.0, 400.0, 500.0
    run.describe([held, returned, asked], {}, None, "running")
    assert run.held.card_s == 600.0 + 100.0


def test_what_a_run_costs_is_told_with_what_it_will_at_the_present_rate(run: RunProgress, clock: list[float]) -> None:
    """At 36 an hour a card costs a hundredth a second."""
    cards = [card(0, 0), card(1, 0)]
    for number in (0, 1):
        run._schedule.handle(CardPlaced(number, "node"))
        run._schedule.handle(loaded(number, "node"))
    assert run.describe(cards, {}, None, "running")["cost"] == 20.0, "two cards for 1000 s"
    for images in (1, 2, 3):
        clock[0] += 10.0
        cards[0].status = stored(images)
        described = run.describe(cards, {}, None, "running")
    assert described["cost"] == 20.6
    assert described["images_per_s"] == 0.1
    assert described["cost_expected"] == pytest.approx(20.6 + 2 * 0.01 * 90), "nine images are left"
    assert [span["cost"] for span in described["drivers"]] == [20.6]


def test_a_card_s_counters_are_there_while_its_process_is(run: RunProgress, clock: list[float]) -> None:
    slot = card(0, 0)
    names = ("watts", "temperature_c", "utilisation", "memory_used_mb", "throttled")

    def described() -> Any:
        return run.describe([slot], {}, None, "running")["cards"]["host-0"]

    assert [described()[name] for name in (*names, "energy_j")] == [None] * 6
    slot.status = CardStatus("batch", 1.0, 0.0, 0, readings=HOT)
    assert {name: described()[name] for name in names} == {name: getattr(HOT, name) for name in names}
    slot.actor = None
    assert [described()[name] for name in names] == [None] * 5
    sums = ThroughputTotals(images=4, energy_j=1640.0, energy_images=4)
    run.committed(CommitInfo(0, "aaaaa0", "host-0", "host", 0, ROWS, 0, 4, sums, "run"), None)
    assert described()["energy_j"] == 1640.0
