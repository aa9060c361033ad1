"""progress.json and the terminal say what the commits, the cards and the faults say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from world import RULES, loaded, shards

from gaudi_batch.card.messages import CardStatus, Ready
from gaudi_batch.card.readings import Readings
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


@pytest.fixture
def run() -> RunProgress:
    schedule = Schedule(shards(3), "a", RowCounts(3 * ROWS), RULES)
    no_ledger: Any = None
    return RunProgress(
        schedule,
        Committed(CommitTotals(), FailedRows({})),
        3 * ROWS,
        0,
        Spending(JobConfig(prompts="p", output="o", device="simulated", price_per_card_hour=36.0), "a"),
        Timeline(no_ledger, "a"),
    )


def card(number: int, images: int) -> Slot:
    ready = Ready("id", "host", number, 1, 0.5, {}, "", None, 1)
    slot = Slot(number, name=f"host-{number}", ready=ready, actor=object(), placed=0.0)
    slot.status = CardStatus("batch", 1.0, 0.0, images)
    return slot


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


def test_images_of_failed_rows_are_missing_from_the_total(run: RunProgress, clock: list[float]) -> None:
    run.committed(commit(0, ROWS - 1), None)
    run.committed(commit(1, ROWS), None)
    described = run.describe([], {}, None, "running")
    assert (described["images"], described["images_total"], described["images_missing"]) == (2 * ROWS - 1, 3 * ROWS, 1)


def test_the_rate_is_that_of_the_last_minute(run: RunProgress, clock: list[float]) -> None:
    rates = []
    for second in range(120):
        clock[0] = 1000.0 + second
        stored = second if second < 60 else 60 + 2 * (second - 60)
        rates.append(run.describe([card(0, stored)], {}, None, "running")["images_per_s"])
    assert rates[:3] == [None, None, None], "a rate of a moment says nothing"
    known = [rate for rate in rates if rate is not None]
    assert known[50] == pytest.approx(1.0)
    assert known[-1] == pytest.approx(2.0, abs=0.05)
    assert all(later >= before - 1e-9 for before, later in itertools.pairwise(known[60:]))


def test_a_rate_needs_no_image_that_is_not_committed_yet(run: RunProgress, clock: list[float]) -> None:
    """As where shards are committed as fast as they are stored."""
    for shard in range(3):
        run.committed(commit(shard, ROWS), None)
        rate = run.describe([], {}, None, "running")["images_per_s"]
        clock[0] += 4.0
    assert rate == 1.0


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
    for stored in (1, 2, 3):
        clock[0] += 10.0
        cards[0].status = CardStatus("batch", 1.0, 0.0, stored)
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
