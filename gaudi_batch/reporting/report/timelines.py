"""What each card did and when, from the timeline's lines and the batches that were committed.

All times are seconds of the run: those of its drivers, one after the other, without what lies between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from gaudi_batch.layout import driver_of
from gaudi_batch.output.progress import is_sane
from gaudi_batch.output.spans import Span
from gaudi_batch.reporting.report.batches import Batch
from gaudi_batch.reporting.report.work import (
    BACKUP,
    FAILED,
    GENERATING,
    KINDS,
    LOADING,
    LOST,
    NODE_GONE,
    QUARANTINED,
    WARMUP,
    Made,
    Stretch,
    Up,
    stretch,
)
from gaudi_batch.text import one_line

MAX_OLD_S = 60.0
"""Seconds that a span may be older than what its driver has committed: it is written every few seconds."""
AT_WORK = ("batch", "first batch", "reading", "storing", "encoding", "asking storage", "silent")
"""Phases of a card that makes a shard."""


class Mark(NamedTuple):
    """Something that happened to a card."""

    kind: str
    """`fault`, `backup`, `dropped`, `quarantined` or `released`."""
    time: float
    text: str


@dataclass
class CardTimeline:
    """One card."""

    name: str
    stretches: list[Stretch] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    was_ready: bool = False
    """Whether it has ever loaded; else it is a place that was given back before."""
    node: str = ""
    """Its node's host name; empty if no line says it."""

    def seconds(self) -> dict[str, float]:
        """Seconds by kind."""
        spent = dict.fromkeys(KINDS, 0.0)
        for each in self.stretches:
            spent[each.kind] += each.stop - each.start
        return spent


class RunClock:
    """Places moments in the time of a run.

    Args:
        spans: of its drivers. One of an older version has left none; its time is that of its batches.
        batches: what was committed.
        lines: of the timeline, by driver.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        batches: Iterable[Batch],
        lines: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        for batch in batches:
            driver = driver_of(batch.attempt)
            first[driver] = min(first.get(driver, math.inf), batch.start - batch.wait_s)
            last[driver] = max(last.get(driver, -math.inf), batch.stop)
        known: dict[str, tuple[float, float]] = {}  # begin in seconds since the epoch, and seconds
        for span in spans:
            begin = seconds_of(span.started_at)
            if begin is not None:
                of_lines = [seconds_of(line.get("time")) or 0.0 for line in (lines or {}).get(span.driver, ())]
                end = max(last.get(span.driver, 0.0), *of_lines, 0.0)
                # Older versions wrote whole seconds down, and left the rest out.
                late = 0.0 if "." in span.started_at else min(1.0, max(0.0, end - begin - span.wall_s))
                # Of a driver that goes on, or was killed, the span was written before its last commits.
                seconds = max(span.wall_s, min(end - begin - late, span.wall_s + MAX_OLD_S))
                known[span.driver] = begin + late, seconds
        for driver in first.keys() - known.keys():
            known[driver] = first[driver], last[driver] - first[driver]
        self._begins: dict[str, tuple[float, float, float]] = {}  # and the seconds of all drivers before
        self.wall_s = 0.0
        """Seconds of the run."""
        for driver, (begin, seconds) in sorted(known.items(), key=lambda item: item[1][0]):
            self._begins[driver] = begin, seconds, self.wall_s
            self.wall_s += seconds

    @property
    def drivers(self) -> list[tuple[str, float, float]]:
        """Each driver with its first and its last second, in their order."""
        return [(driver, before, before + seconds) for driver, (_, seconds, before) in self._begins.items()]

    def at(self, epoch: float, driver: str) -> float:
        """A moment of a driver, in seconds since the epoch by its clock, as seconds of the run; 0 for a driver of whom
        nothing is known."""
        begin, seconds, before = self._begins.get(driver, (epoch, 0.0, 0.0))
        return before + min(max(0.0, epoch - begin), seconds)


def timelines(
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    batches: Iterable[Batch],
    clock: RunClock,
    at_work: Mapping[str, float] | None = None,
    unfinished: str = LOST,
) -> list[CardTimeline]:
    """The timeline of each card, by name.

    Args:
        lines: the timeline's, by driver.
        batches: what was committed.
        clock: of the run.
        at_work: cards that were making something when the last driver reported last, with for how many seconds; None
            if that is not known. Of an older version, which has not said in its lines when its cards had work: if that
            is not known, or the run goes on, all since such a card's last batch counts as work.
        unfinished: what work is that had not ended when the last driver reported last.
    """
    cards: dict[str, CardTimeline] = {}
    made: dict[tuple[str, str], list[Batch]] = {}
    for batch in sorted(batches, key=lambda batch: batch.start):
        made.setdefault((driver_of(batch.attempt), batch.card), []).append(batch)
    for driver, begin, end in clock.drivers:
        is_last = end == clock.wall_s
        lives = [*_lives(lines.get(driver, ()), clock, driver, (begin, end))]
        begun = [clock.at(of_card[0].start, driver) for (of, _), of_card in made.items() if of == driver]
        begun += [time for life in lives for up in life.ups for time, what in up.changes if what == "works"]
        told = {life.name for life in lives}
        for of, name in made:
            if of == driver and name not in told:  # an older version wrote no timeline, or the line comes later
                of_card = made[of, name]
                start = clock.at(of_card[0].start - of_card[0].wait_s, driver)
                lives.append(
                    _Life(name, was_ready=True, is_over=True, ups=[Up(start, clock.at(of_card[-1].stop, driver))])
                )
        for life in lives:
            card = cards.setdefault(life.name, CardTimeline(life.name))
            card.was_ready |= life.was_ready
            card.node = life.node or card.node
            card.marks += life.marks
            lost_from: float | None = 0.0
            if is_last and at_work is not None and life.name not in at_work:
                lost_from = None
            elif is_last and at_work is not None and unfinished == LOST:
                lost_from = end - at_work[life.name]
            life.unfinished = unfinished if is_last else LOST
            life.begun = min(begun, default=math.inf)
            card.stretches += life.fill(made.get((driver, life.name), []), clock, driver, lost_from)
    return [cards[name] for name in sorted(cards)]


@dataclass
class _Life:
    """What one driver's lines say of a card."""

    name: str
    was_ready: bool = False
    node: str = ""
    stretches: list[Stretch] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    ups: list[Up] = field(default_factory=list)
    backups: dict[str, float] = field(default_factory=dict)
    """When it began each."""
    dropped: list[tuple[float, str]] = field(default_factory=list)
    is_over: bool = False
    """Whether its driver has told what it was at in the end."""
    lost_from: float | None = None
    """Since when it was then at work that was not committed; None if it was not."""
    unfinished: str = LOST
    """The kind of that work."""
    begun: float = math.inf
    """When a card of its driver first had work."""
    tells_work: bool = False
    """Whether its driver says when its cards have work."""

    def fill(self, batches: Iterable[Batch], clock: RunClock, driver: str, lost_from: float | None) -> list[Stretch]:
        """All stretches, those of its batches among them.

        Args:
            batches: that were committed, in order.
            clock: of the run.
            driver: whose batches they are.
            lost_from: since when it was at work that was not committed as its driver ended, where no line says so.
        """
        made = []
        for batch in batches:
            kind = BACKUP if batch.attempt in self.backups else WARMUP if batch.warmup else GENERATING
            start, stop = clock.at(batch.start, driver), clock.at(batch.stop, driver)
            made.append(Made(kind, start, stop, batch.wait_s, batch.attempt))
        lost_from = self.lost_from if self.is_over else lost_from
        stretches = list(self.stretches)
        for up in self.ups:
            work = up.work() if self.tells_work else self._guessed_work(up, made, lost_from)
            stretches += up.fill(made, work, self.unfinished, self.begun)
        return sorted(stretches, key=lambda each: each.start)

    def _guessed_work(self, up: Up, made: Iterable[Made], lost_from: float | None) -> list[Stretch]:
        """When it had work, by a driver of an older version, which did not say so: up to its last batch, and while it
        was at what is known not to be committed."""
        at = max((min(batch.stop, up.stop) for batch in made if up.holds(batch)), default=up.start)
        dropped, attempt = max(((time, name) for time, name in self.dropped if at < time <= up.stop), default=(at, ""))
        begun = min(max(at, self.backups.get(attempt, at)), dropped)  # it was idle until it began a backup
        lost = up.stop
        if up.end in FAILED:
            lost = dropped
        elif not up.end and lost_from is not None:
            lost = min(max(dropped, lost_from), up.stop)
        kind = BACKUP if attempt in self.backups else LOST
        return [*stretch(LOST, up.start, at), *stretch(kind, begun, dropped), *stretch(LOST, lost, up.stop)]


def _lives(
    lines: Sequence[Mapping[str, Any]], clock: RunClock, driver: str, span: tuple[float, float]
) -> Iterable[_Life]:
    """The cards of a driver's lines."""
    by_slot: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_slot.setdefault(str(line.get("slot")), []).append(line)
    tells_work = any(line.get("what") == "works" for line in lines)
    for slot, of_slot in by_slot.items():
        moments = [(seconds_of(line.get("time")), line) for line in of_slot]
        timed = [(clock.at(moment, driver), line) for moment, line in moments if moment is not None]
        life = _life(slot, timed, span)
        life.tells_work = tells_work
        yield life


def _life(slot: str, lines: Sequence[tuple[float, Mapping[str, Any]]], span: tuple[float, float]) -> _Life:
    names = [str(line["card"]) for _, line in lines if line.get("card")]
    life = _Life(one_line(names[-1] if names else f"place {slot}, never ready"), was_ready=bool(names))
    state, since = "", span[0]
    changes: list[tuple[float, str]] = []
    for at, line in lines:
        what, error = str(line.get("what")), one_line(line.get("error") or "")
        if what == "ready":
            life.node = one_line(line.get("node") or "")
        if what in ("starting", "ready", QUARANTINED, "released"):
            _close(life, state, Up(since, at, NODE_GONE if line.get("node_gone") else what, changes))
            state, since, changes = what, at, []
        if what in ("works", "idle", "backup"):
            changes.append((at, what))
        if what == "fault":
            life.marks.append(Mark("fault", at, error))
        elif what == "backup":
            life.backups[str(line.get("attempt"))] = at
            life.marks.append(Mark("backup", at, f"makes shard {line.get('shard')}, too"))
        elif what == "dropped":
            life.dropped.append((at, str(line.get("attempt"))))
            life.marks.append(Mark("dropped", at, f"attempt {one_line(line.get('attempt'))}"))
        elif what == "over":
            life.is_over = True
            if line.get("phase") in AT_WORK:
                phase_s = line.get("phase_s")
                life.lost_from = at - (phase_s if is_sane(phase_s) else 0.0)
        elif what in (QUARANTINED, "released"):
            life.marks.append(
                Mark(what, at, error or (NODE_GONE if line.get("node_gone") else "its place was given back"))
            )
    failed_at = max((mark.time for mark in life.marks if mark.kind in ("fault", "dropped")), default=-math.inf)
    overtaken_at = max((time for time, attempt in life.dropped if attempt in life.backups), default=-math.inf)
    _close(life, state, Up(since, span[1], changes=changes, failed_at=failed_at, overtaken_at=overtaken_at))
    return life


def _close(life: _Life, state: str, up: Up) -> None:
    """Ends what a card was at; by a line, or with its driver."""
    if state == "ready":
        life.ups.append(up)
    elif state in ("starting", QUARANTINED):
        life.stretches += stretch(LOADING if state == "starting" else QUARANTINED, up.start, up.stop)


def seconds_of(moment: Any) -> float | None:
    """A time in ISO 8601 in seconds since the epoch; None if it is none."""
    try:
        return datetime.fromisoformat(str(moment).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError):
        return None
