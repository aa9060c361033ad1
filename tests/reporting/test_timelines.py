"""What a report draws of the cards is what became of them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest

from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.spans import Span
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.reporting.report.batches import Batch, _of_line, _of_sums, pace
from gaudi_batch.reporting.report.drawing import drawn
from gaudi_batch.reporting.report.rates import rate_of_all, rates_by_card
from gaudi_batch.reporting.report.timelines import UNCOMMITTED, RunClock, Stretch, timelines

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
    told_of = {"aaaaa": lines}
    (card,) = timelines(told_of, batches, RunClock([span("aaaaa", 0, wall_s)], batches, told_of), {})
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
    backup = line(7, "backup", attempt="aaaaa7", shard=3, backup_of="aaaaa2")
    assert told([*START, backup, *overtaken[2:]], [batch(3)])[2:] == [("tail", 4, 7), ("backup", 7, 9), ("tail", 9, 20)]
    at_the_end = [*START, backup, line(20, "over", phase="batch", phase_s=6)]
    assert told(at_the_end, [batch(3)])[2:] == [("tail", 4, 7), ("backup", 7, 20)], "its other attempt was faster"
    failed = [*START, backup, line(9, "fault", error="no"), line(9, "starting"), line(20, "ready")]
    assert told(failed, [batch(3)])[2:] == [("lost", 4, 9), ("loading", 9, 20)]
    in_the_making = [*START, line(20, "over", phase="batch", phase_s=6)]
    assert told(in_the_making, [batch(3)])[2:] == [("tail", 4, 14), ("lost", 14, 20)]


def test_all_batches_that_are_not_committed_are_no_idle_time() -> None:
    """However short the batch is at which the card is: it has made others of that shard before."""
    line_of = [*START, line(20, "over", phase="batch", phase_s=1, uncommitted_s=16.5)]
    assert told(line_of, [batch(3)])[2:] == [("lost", 4, 20)], "it got the shard while it made the one before"
    line_of = [*START, line(20, "over", phase="batch", phase_s=1, uncommitted_s=6)]
    assert told(line_of, [batch(3)])[2:] == [("tail", 4, 14), ("lost", 14, 20)]
    line_of = [*START, line(20, "over", phase="storing", phase_s=1, uncommitted_s=0)]
    assert told(line_of, [batch(3)])[2:] == [("tail", 4, 20)], "all that it stores is committed by now"


def test_what_is_in_the_making_is_not_lost_while_the_run_goes_on() -> None:
    clock = RunClock([span("aaaaa", 0, 20)], [batch(3)])
    (card,) = timelines({"aaaaa": START}, [batch(3)], clock, {"a": 17.0}, UNCOMMITTED)
    assert [stretch.kind for stretch in card.stretches] == ["loading", "generating", "uncommitted"]
    assert card.seconds()["uncommitted"] == pytest.approx(16)


def test_a_card_that_is_given_back_was_idle() -> None:
    assert told([*START, line(6, "released")], [batch(3)])[2:] == [("tail", 4, 6)]
    assert told([*START, line(6, "released", node_gone=True)], [batch(3)])[2:] == [("lost", 4, 6)], "with its node"


def test_batches_of_a_backup_attempt_are_told_apart() -> None:
    lines = [*START, line(4, "backup", shard=3, attempt="aaaaa9", backup_of="aaaaa2")]
    assert told(lines, [batch(3), batch(4, attempt="aaaaa9")], 5)[1:] == [("generating", 3, 4), ("backup", 4, 5)]


def test_a_quarantined_card_stays_so_to_the_end() -> None:
    lines = [*START, line(6, "fault", error="no"), line(6, "quarantined", error="no")]
    assert told(lines, [batch(3)])[2:] == [("lost", 4, 6), ("quarantined", 6, 20)]


def test_the_time_between_two_drivers_is_no_time_of_the_run() -> None:
    clock = RunClock([span("aaaaa", 0, 10), span("bbbbb", 1000, 5)], [])
    moments = [("aaaaa", -1), ("aaaaa", 3), ("aaaaa", 500), ("bbbbb", 1000), ("bbbbb", 1004), ("bbbbb", 2000)]
    assert [clock.at(BEGIN + moment, driver) for driver, moment in moments] == [0, 3, 10, 10, 14, 15]
    assert (clock.drivers, clock.wall_s) == ([("aaaaa", 0, 10), ("bbbbb", 10, 15)], 15)


def test_the_clock_of_a_later_driver_may_be_behind() -> None:
    made = [batch(3), batch(100 - 40, attempt="bbbbb1")]
    clock = RunClock([span("aaaaa", 0, 50), span("bbbbb", 95 - 40, 20)], made)
    lines = {
        "aaaaa": [*START, line(50, "over", phase="idle", phase_s=46)],
        "bbbbb": [line(56, "starting"), line(57, "ready")],
    }
    (card,) = timelines(lines, made, clock, {})
    assert card.seconds()["generating"] == 2
    assert card.stretches[-2:] == [Stretch("generating", 55, 56), Stretch("tail", 56, 70)]


def test_a_span_in_whole_seconds_of_an_older_version_cuts_nothing_off() -> None:
    old = Span("aaaaa", iso(0)[:19] + "+00:00", iso(5)[:19] + "+00:00", 5.0, 5.0)
    made = [batch(4.2, 1.4)]  # it began at 0.9
    clock = RunClock([old], made)
    assert clock.at(made[0].stop, "aaaaa") - clock.at(made[0].start, "aaaaa") == pytest.approx(1.4)


def test_a_run_without_timeline_or_spans_shows_its_batches() -> None:
    made = [batch(3, attempt="aaaaa1"), batch(5, attempt="aaaaa2", card="b", wait=0.5)]
    cards = timelines({}, made, RunClock([], made))
    assert [(card.name, [stretch.kind for stretch in card.stretches]) for card in cards] == [
        ("a", ["generating"]),
        ("b", ["start", "generating"]),
    ]


def test_drivers_of_an_older_version_are_shown_before_those_that_left_a_span() -> None:
    made = [batch(3), batch(103, attempt="bbbbb1")]
    clock = RunClock([span("bbbbb", 100, 10)], made)
    assert clock.drivers == [("aaaaa", 0, 1), ("bbbbb", 1, 11)]
    rate = rate_of_all(made, clock)
    assert rate.values[""].sum() * rate.bin_s == pytest.approx(16)


def test_a_place_that_never_had_a_card_is_told_apart() -> None:
    lines = {"aaaaa": [*START, line(1, "starting", slot=1, card=""), line(2, "released", slot=1, card="")]}
    cards = timelines(lines, [batch(3)], RunClock([span("aaaaa", 0, 20)], [batch(3)], lines), {})
    assert [(card.name, card.was_ready) for card in cards] == [("a", True), ("place 1, never ready", False)]


def test_every_image_is_in_the_rates_whatever_the_bins() -> None:
    made = [batch(0.3 * number, 0.29, card=f"c{number % 3}") for number in range(300)]
    clock = RunClock([span("aaaaa", 0, 95)], made)
    of_all, by_card = rate_of_all(made, clock), rates_by_card(made, clock)
    assert of_all.values[""].sum() * of_all.bin_s == pytest.approx(8 * 300)
    assert sum(values.sum() for values in by_card.values.values()) * by_card.bin_s == pytest.approx(8 * 300)
    assert np.all(np.abs(of_all.values[""][1:90] - 8 / 0.3) < 4)


def test_the_rate_of_all_is_as_fine_with_a_thousand_cards() -> None:
    made = [batch(number / 10, card=f"c{number}") for number in range(1000)]
    clock = RunClock([span("aaaaa", 0, 101)], made)
    assert len(rate_of_all(made, clock).values[""]) == 120
    assert len(rates_by_card(made, clock).values["c0"]) == 12


@pytest.mark.parametrize(
    "fields",
    [
        {"generate_s": float("nan")},
        {"generate_s": 1e999},
        {"generate_s": -1},
        {"wait_s": float("nan")},
        {"images": 10**400},
        {"started_at": "yesterday"},
        {"phase": None, "images": None},
    ],
)
def test_a_line_that_can_not_be_is_left_out(fields: dict[str, Any]) -> None:
    whole = {"time": iso(1), "started_at": iso(0), "generate_s": 1, "wait_s": 0, "images": 8, "phase": "steady"}
    info = CommitInfo(0, "aaaaa1", "a", "n", 0, 8, 0, 8, ThroughputTotals(2, 8, 0, 1, 0.5, 0.7), finished_at=BEGIN)
    assert _of_line(whole, info) is not None
    assert _of_line(whole | fields, info) is None
    (warmup, steady) = _of_sums(info)
    assert (warmup.calls, steady.calls, steady.stop) == (2, 1, BEGIN), "a share of a call is one"
    assert pace([warmup, steady], {}) == {"a": 1.0}


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
