"""What a report draws of the cards is what became of them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest

from gaudi_batch.output.spans import Span
from gaudi_batch.reporting.report.batches import Batch, pace
from gaudi_batch.reporting.report.rates import rates
from gaudi_batch.reporting.report.timelines import RunClock, Stretch, drawn, timelines

BEGIN = 1_000_000.0


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(BEGIN + seconds, timezone.utc).isoformat(timespec="milliseconds")


def span(driver: str, start: float, wall_s: float) -> Span:
    return Span(driver, iso(start), iso(start + wall_s), wall_s, wall_s)


def batch(start: float, seconds: float = 1.0, wait: float = 0.0, attempt: str = "aaaaa1", **more: Any) -> Batch:
    return Batch(more.pop("card", "a"), attempt, 0, BEGIN + start, seconds, wait, 8, more.pop("warmup", False), **more)


def line(at: float, what: str, slot: int = 0, card: str = "a", **more: Any) -> dict[str, Any]:
    return {"time": iso(at), "slot": slot, "card": card, "what": what, **more}


def told(lines: list[dict[str, Any]], batches: list[Batch], wall_s: float = 20.0) -> list[tuple[str, float, float]]:
    (card,) = timelines({"aaaaa": lines}, batches, RunClock([span("aaaaa", 0, wall_s)], batches), {})
    return [(stretch.kind, round(stretch.start, 2), round(stretch.stop, 2)) for stretch in card.stretches]


START = [line(1, "starting", card=""), line(3, "ready")]


def test_a_card_that_loads_works_and_waits() -> None:
    made = [batch(3.5, wait=0.5, warmup=True), batch(4.5), batch(7, wait=1.5)]
    assert told([*START, line(20, "over", phase="idle", phase_s=12)], made) == [
        ("loading", 1, 3),
        ("start", 3, 3.5),
        ("warm-up", 3.5, 4.5),
        ("generating", 4.5, 5.5),
        ("waiting", 5.5, 7),
        ("generating", 7, 8),
        ("tail", 8, 20),
    ]


def test_a_hang_is_lost_until_its_process_is_replaced() -> None:
    lines = [*START, line(9, "fault", error="its batch took longer than 5 s"), line(9, "starting"), line(11, "ready")]
    made = [batch(3), batch(11.5, wait=0.5)]
    assert told([*lines, line(12.5, "over", phase="idle", phase_s=0)], made, 12.5)[2:] == [
        ("lost", 4, 9),
        ("loading", 9, 11),
        ("start", 11, 11.5),
        ("generating", 11.5, 12.5),
    ]


def test_work_that_is_not_committed_is_lost() -> None:
    """The device was idle for a second before a batch, so what came before that second was a call without a record."""
    assert told(START, [batch(3), batch(10, wait=1)], 11)[2:] == [
        ("lost", 4, 9),
        ("waiting", 9, 10),
        ("generating", 10, 11),
    ]
    overtaken = [*START, line(9, "dropped", attempt="aaaaa7"), line(20, "over", phase="idle", phase_s=11)]
    assert told(overtaken, [batch(3)])[2:] == [("lost", 4, 9), ("tail", 9, 20)]
    in_the_making = [*START, line(20, "over", phase="batch", phase_s=6)]
    assert told(in_the_making, [batch(3)])[2:] == [("tail", 4, 14), ("lost", 14, 20)]


def test_batches_of_a_backup_attempt_are_told_apart() -> None:
    lines = [*START, line(4, "backup", shard=3, attempt="aaaaa9", backup_of="aaaaa2")]
    assert told(lines, [batch(3), batch(4, attempt="aaaaa9")], 5)[1:] == [("generating", 3, 4), ("backup", 4, 5)]


def test_a_quarantined_card_stays_so_to_the_end() -> None:
    lines = [*START, line(6, "fault", error="no"), line(6, "quarantined", error="no")]
    assert told(lines, [batch(3)])[2:] == [("lost", 4, 6), ("quarantined", 6, 20)]


def test_the_time_between_two_drivers_is_no_time_of_the_run() -> None:
    clock = RunClock([span("aaaaa", 0, 10), span("bbbbb", 1000, 5)], [])
    assert [clock.at(BEGIN + moment) for moment in (3, 500, 1000, 1004, 2000)] == [3, 10, 10, 14, 15]
    assert (clock.drivers, clock.wall_s) == ([("aaaaa", 0, 10), ("bbbbb", 10, 15)], 15)


def test_a_run_without_timeline_or_spans_shows_its_batches() -> None:
    made = [batch(3, attempt="1"), batch(5, attempt="2", card="b", wait=0.5)]
    cards = timelines({}, made, RunClock([], made))
    assert [(card.name, [stretch.kind for stretch in card.stretches]) for card in cards] == [
        ("a", ["generating"]),
        ("b", ["start", "generating"]),
    ]


def test_every_image_is_in_the_rates_whatever_the_bins() -> None:
    made = [batch(0.3 * number, 0.29, card=f"c{number % 3}") for number in range(300)]
    over_time = rates(made, RunClock([span("aaaaa", 0, 95)], made))
    assert over_time.all().sum() * over_time.bin_s == pytest.approx(8 * 300)
    steady = over_time.all()[1:90]
    assert np.all(np.abs(steady - 8 / 0.3) < 4)


def test_a_card_of_half_the_pace_is_half_as_fast_whatever_sizes_it_made() -> None:
    kinds = {0: "small", 1: "large"}
    made = [
        *[Batch("a", "", shard, 0, seconds, 0, 8, False) for shard, seconds in ((0, 1.0), (1, 4.0))],
        *[Batch("b", "", 0, 0, 1.0, 0, 8, False), Batch("c", "", 1, 0, 8.0, 0, 8, False)],
        Batch("d", "", 1, 0, 4.0, 0, 8, False),
    ]
    assert pace(made, kinds) == {"a": 1.0, "b": 1.0, "c": 0.5, "d": 1.0}


def test_what_is_drawn_has_the_same_length_and_few_parts() -> None:
    stretches = [Stretch("generating" if number % 2 else "waiting", number, number + 1.0) for number in range(10_000)]
    stretches = [Stretch("loading", -50, 0), *stretches, Stretch("lost", 10_000, 10_200)]
    few = drawn(stretches, 25)
    assert len(few) <= 10_000 / 25 * 2
    assert (few[0], few[-1]) == (stretches[0], stretches[-1])
    assert sum(part.stop - part.start for part in few) == pytest.approx(10_250, rel=0.01)
    assert drawn(stretches, 0.5) == stretches
