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
from gaudi_batch.reporting.report.timelines import MAX_OLD_S, RunClock, timelines
from gaudi_batch.reporting.report.work import UNCOMMITTED, Stretch

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
    of_other = line(7, "backup", attempt="aaaaa7", shard=3, backup_of="aaaaa2")
    assert told([*START, of_other, *overtaken[2:]], [batch(3)])[2:] == [
        ("tail", 4, 7),
        ("backup", 7, 9),
        ("tail", 9, 20),
    ]
    failed = [*START, of_other, line(9, "fault", error="no"), line(9, "starting"), line(20, "ready")]
    assert told(failed, [batch(3)])[2:] == [("lost", 4, 9), ("loading", 9, 20)]
    in_the_making = [*START, line(20, "over", phase="batch", phase_s=6)]
    assert told(in_the_making, [batch(3)])[2:] == [("tail", 4, 14), ("lost", 14, 20)]


WORKS = [*START, line(3, "works")]


def test_a_card_is_idle_when_its_driver_says_so_and_else_at_work() -> None:
    made = [batch(3), batch(6, wait=2), batch(14.5, wait=8.5)]
    lines = [*WORKS, line(4, "idle"), line(5, "works"), line(7, "idle"), line(14, "works")]
    assert told(lines, made)[1:] == [
        ("generating", 3, 4),
        ("tail", 4, 5),
        ("waiting", 5, 6),
        ("generating", 6, 7),
        ("tail", 7, 14),
        ("waiting", 14, 14.5),
        ("generating", 14.5, 15.5),
        ("lost", 15.5, 20),
    ]


def test_the_moment_until_a_driver_hears_that_a_card_is_idle_is_no_work() -> None:
    assert told([*WORKS, line(4.1, "idle")], [batch(3)])[1:] == [
        ("generating", 3, 4),
        ("tail", 4, 4.1),
        ("tail", 4.1, 20),
    ]


def test_a_card_that_begins_nothing_after_others_have_begun_is_idle() -> None:
    """Its process was replaced when nothing was left for it, and got a shard after a minute; one came when all was
    begun; all others began as soon as there was a plan."""
    first = [line(1, "starting"), line(2, "ready"), line(5, "works"), line(8, "starting"), line(9, "ready")]
    late = [line(9, "starting", 1, "b"), line(10, "ready", 1, "b")]
    soon = [line(1, "starting", 2, "c"), line(2, "ready", 2, "c"), line(5, "works", 2, "c"), line(13, "idle", 2, "c")]
    lines = {"aaaaa": [*first, line(70, "works"), line(72, "idle"), *late, *soon]}
    made = [batch(5.5, wait=3.5), batch(70.5, 1.5, wait=61.5)]
    clock = RunClock([span("aaaaa", 0, 80)], made, lines)
    drawn_of = {
        card.name: [(stretch.kind, round(stretch.start, 2), round(stretch.stop, 2)) for stretch in card.stretches]
        for card in timelines(lines, made, clock, {})
    }
    assert drawn_of["a"] == [
        ("loading", 1, 2),
        ("start", 2, 5),
        ("start", 5, 5.5),
        ("generating", 5.5, 6.5),
        ("lost", 6.5, 8),
        ("loading", 8, 9),
        ("tail", 9, 70),
        ("start", 70, 70.5),
        ("generating", 70.5, 72),
        ("tail", 72, 80),
    ]
    assert drawn_of["b"] == [("loading", 9, 10), ("tail", 10, 80)]
    assert drawn_of["c"] == [("loading", 1, 2), ("start", 2, 5), ("lost", 5, 13), ("tail", 13, 80)]


def test_a_card_that_has_no_work_a_moment_longer_than_others_is_at_its_start() -> None:
    others = [line(1, "starting", 1, "b"), line(2, "ready", 1, "b"), line(2, "works", 1, "b")]
    lines = {"aaaaa": [*START, line(3.8, "works"), *others]}
    made = [batch(4, wait=1)]
    (card, _) = timelines(lines, made, RunClock([span("aaaaa", 0, 5)], made, lines), {})
    assert [stretch.kind for stretch in card.stretches] == ["loading", "start", "start", "generating"]


def test_cards_that_wait_for_the_plan_are_at_their_start() -> None:
    assert told(START, []) == [("loading", 1, 3), ("start", 3, 20)]


def test_idle_time_after_work_that_came_to_nothing_is_no_start() -> None:
    overtaken = [*WORKS, line(5, "dropped", attempt="aaaaa7"), line(6, "idle"), line(9, "works")]
    assert told(overtaken, [batch(9.5, wait=3.5)], 10.5)[1:] == [
        ("lost", 3, 6),
        ("tail", 6, 9),
        ("start", 9, 9.5),
        ("generating", 9.5, 10.5),
    ]


def test_a_batch_that_began_before_its_card_was_ready_is_drawn() -> None:
    """Clocks are read one after the other."""
    lines = [line(1, "starting"), line(10, "ready"), line(10, "works")]
    assert told(lines, [batch(9.7, 30.3)], 40)[1:] == [("generating", 10, 40)]
    lines = [*WORKS, line(9, "starting"), line(11, "ready"), line(11, "works")]
    assert told(lines, [batch(3, 3), batch(10.6, 9.4)]) == [
        ("loading", 1, 3),
        ("generating", 3, 6),
        ("lost", 6, 9),
        ("loading", 9, 11),
        ("generating", 11, 20),
    ]


def test_work_without_a_committed_batch_is_lost_and_idle_time_before_it_is_not() -> None:
    """It was idle, and then its process died at a shard; and an attempt of another was overtaken before a batch."""
    died = [*WORKS, line(4, "idle"), line(8, "works"), line(11, "starting"), line(12, "ready"), line(12, "works")]
    assert told([*died, line(13, "idle")], [batch(3), batch(12)])[2:] == [
        ("tail", 4, 8),
        ("lost", 8, 11),
        ("loading", 11, 12),
        ("generating", 12, 13),
        ("tail", 13, 20),
    ]
    overtaken = [*WORKS, line(9, "dropped", attempt="aaaaa7"), line(10, "idle"), line(14, "works"), line(15, "idle")]
    assert told(overtaken, [batch(3), batch(14, wait=4)])[2:] == [
        ("lost", 4, 10),
        ("tail", 10, 14),
        ("generating", 14, 15),
        ("tail", 15, 20),
    ]


def backup(at: float, attempt: str) -> list[dict[str, Any]]:
    return [line(at, "works"), line(at, "backup", attempt=attempt, shard=3, backup_of="aaaaa2")]


def test_each_backup_attempt_is_drawn_as_one_whatever_became_of_it() -> None:
    first = [line(5, "idle"), *backup(7, "aaaaa7"), line(9, "dropped", attempt="aaaaa7"), line(10, "idle")]
    second = [*backup(12, "aaaaa8"), line(14, "idle")]
    stretches = told([*WORKS, *first, *second], [batch(3, seconds=2)])
    assert stretches[2:] == [
        ("tail", 5, 7),
        ("backup", 7, 10),
        ("tail", 10, 12),
        ("backup", 12, 14),
        ("tail", 14, 20),
    ]
    own = [line(15, "works")]
    made = [batch(3, seconds=2), batch(15.5, wait=1.5)]
    assert told([*WORKS, *first, *second, *own], made)[7:] == [
        ("waiting", 15, 15.5),
        ("generating", 15.5, 16.5),
        ("lost", 16.5, 20),
    ]
    assert told([*WORKS, *first, *second], made[:1])[3] == ("backup", 7, 10)
    died = [*WORKS, *first[:3], line(9, "starting"), line(20, "ready")]
    assert told(died, [batch(3, seconds=2)])[2:] == [("tail", 5, 7), ("lost", 7, 9), ("loading", 9, 20)]


def test_a_backup_attempt_that_is_in_the_making_when_its_driver_ends_is_lost() -> None:
    begun = [*WORKS, line(5, "idle"), *backup(7, "aaaaa7")]
    over = line(20, "over", phase="batch", phase_s=13)
    made = [batch(3, seconds=2)]
    assert told([*begun, over], made)[2:] == [("tail", 5, 7), ("lost", 7, 20)]
    overtaken = line(9, "dropped", attempt="aaaaa7")
    assert told([*begun, overtaken, over], made)[3:] == [("backup", 7, 20)], "its card has not ended it"
    earlier = [overtaken, line(10, "idle"), *backup(12, "aaaaa8"), over]
    assert told([*begun, *earlier], made)[3:] == [("backup", 7, 10), ("tail", 10, 12), ("lost", 12, 20)]
    committed = [batch(7, attempt="aaaaa7"), batch(8, attempt="aaaaa7")]
    assert told([*begun, line(9, "idle")], [*made, *committed])[3:] == [
        ("backup", 7, 8),
        ("backup", 8, 9),
        ("tail", 9, 20),
    ]


def test_a_backup_attempt_that_is_in_the_making_is_not_committed_while_the_run_goes_on() -> None:
    begun = [*WORKS, line(5, "idle"), *backup(7, "aaaaa7")]

    def last(more: list[dict[str, Any]], of: str = "aaaaa") -> str:
        lines = {"aaaaa": [*begun, *more], "bbbbb": [line(30, "starting")]}
        spans = [span("aaaaa", 0, 20), *([span("bbbbb", 25, 10)] if of != "aaaaa" else [])]
        made = [batch(3, seconds=2)]
        (card,) = timelines(lines, made, RunClock(spans, made, lines), None, UNCOMMITTED)
        (kind,) = [stretch.kind for stretch in card.stretches if stretch.start == 7]
        return kind

    assert last([]) == "uncommitted"
    assert last([line(9, "dropped", attempt="aaaaa7")]) == "backup"
    assert last([], of="bbbbb") == "lost", "its driver has ended, and another goes on"


def test_what_is_in_the_making_is_not_lost_while_the_run_goes_on() -> None:
    lines = {"aaaaa": [*WORKS, line(5, "idle"), line(5, "works")]}
    clock = RunClock([span("aaaaa", 0, 20)], [batch(3)], lines)
    (card,) = timelines(lines, [batch(3)], clock, None, UNCOMMITTED)
    assert [stretch.kind for stretch in card.stretches] == ["loading", "generating", "uncommitted", "uncommitted"]
    assert card.seconds()["uncommitted"] == pytest.approx(16), "however short the batch is at which it is"


def test_a_shard_that_is_committed_after_the_next_one_is_not_lost_while_the_run_goes_on() -> None:
    """Rows of it are in doubt until another card has confirmed them."""

    def between(more: list[dict[str, Any]], next_attempt: str = "aaaaa3", unfinished: str = UNCOMMITTED) -> str:
        lines = {"aaaaa": [*WORKS, *more]}
        made = [batch(3), batch(9, attempt=next_attempt)]
        (card,) = timelines(lines, made, RunClock([span("aaaaa", 0, 20)], made, lines), None, unfinished)
        (kind,) = [stretch.kind for stretch in card.stretches if (stretch.start, stretch.stop) == (4, 9)]
        return kind

    assert between([]) == "uncommitted"
    assert between([line(2, "fault", error="before")]) == "uncommitted"
    assert between([line(8, "dropped", attempt="aaaaa2")]) == "lost"
    assert between([line(9.5, "fault", error="failed at aaaaa2: no")]) == "lost", "which is heard of a moment later"
    assert between([line(15, "starting")]) == "lost", "with its process"
    assert between([], "aaaaa1") == "lost", "all batches of that shard are known"
    assert between([], unfinished="lost") == "lost"


def test_a_card_of_an_older_driver_that_goes_on_has_been_at_work_since_its_last_batch() -> None:
    """No line says when it had work, and what it reported last says only since when it is at its present batch."""
    lines = {"aaaaa": [*START, line(1, "starting", 1, "b"), line(3, "ready", 1, "b")]}
    made = [batch(3), batch(3, 12, card="b")]
    clock = RunClock([span("aaaaa", 0, 20)], made, lines)
    slow, idle = timelines(lines, made, clock, {"a": 2.0}, UNCOMMITTED)
    assert [(stretch.kind, stretch.stop - stretch.start) for stretch in slow.stretches[2:]] == [("uncommitted", 16)]
    assert [(stretch.kind, stretch.stop - stretch.start) for stretch in idle.stretches[2:]] == [("tail", 5)]


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


def test_what_a_driver_committed_after_it_wrote_its_times_lies_where_it_was() -> None:
    assert RunClock([span("aaaaa", 0, 10)], [batch(12)]).wall_s == pytest.approx(13)
    assert RunClock([span("aaaaa", 0, 10)], [batch(5000)]).wall_s == 10 + MAX_OLD_S, "by a clock that is wrong"


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
