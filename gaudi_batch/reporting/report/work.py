"""What a card was at in the life of one of its processes: its batches, and what lies between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LOADING, WARMUP, GENERATING, BACKUP = "loading", "warm-up", "generating", "backup"
START, WAITING, TAIL, LOST, QUARANTINED = "start", "waiting", "tail", "lost", "quarantined"
UNCOMMITTED = "uncommitted"
KINDS: Mapping[str, str] = {
    LOADING: "a process starts and loads the model",
    START: "loaded, before the first batch",
    WARMUP: "first batches of a shape, which compile",
    GENERATING: "batches that were committed",
    UNCOMMITTED: "work on shards that were not committed yet when the driver wrote last",
    BACKUP: "work on a backup attempt, which is committed or which the other card overtook",
    WAITING: "idle between two batches",
    LOST: "work that was never committed: a fault, a hang, a run that was ended, an attempt that a backup overtook",
    TAIL: "idle, and nothing was left to begin",
    QUARANTINED: "given up; no process runs",
}
"""What a card can be at, with what it means."""
NODE_GONE = "its node is gone"
FAILED = ("starting", QUARANTINED, NODE_GONE)
"""Ends of a process by which the work that it had begun was lost."""
MIN_LOST_S = 0.25
"""A gap between two batches, or after the last, below this is no work that was lost: clocks are read one after the
other."""


class Stretch(NamedTuple):
    """A card was at one thing from `start` to `stop`."""

    kind: str
    start: float
    stop: float


class Made(NamedTuple):
    """A batch that was committed, in seconds of the run."""

    kind: str
    start: float
    stop: float
    wait_s: float
    """Seconds for which the device was idle before."""


@dataclass
class Up:
    """A time in which one process of a card worked."""

    start: float
    stop: float
    end: str = ""
    """The line that ended it; none where the driver ended, or goes on."""
    changes: list[tuple[float, str]] = field(default_factory=list)
    """The lines `works`, `backup` and `idle`."""

    def work(self) -> list[Stretch]:
        """The times in which it had work, each with what that is if it is not committed."""
        periods: list[Stretch] = []
        kind, since = "", self.start
        for time, what in self.changes:
            now = max(since, time)  # a card is idle from when its device was, which another line may have followed
            if kind:
                periods += stretch(kind, since, now)
            kind, since = {"works": LOST, "backup": BACKUP}.get(what, ""), now
        return periods + (stretch(kind, since, self.stop) if kind else [])

    def fill(self, made: Iterable[Made], work: Sequence[Stretch], unfinished: str) -> list[Stretch]:
        """All that the card was at, in order.

        Args:
            made: its batches, in order; those of other processes are passed over.
            work: the times in which it had work.
            unfinished: what work is that had not ended with the driver, or goes on.
        """
        stretches: list[Stretch] = []
        at, idle, pause = self.start, START, START
        for batch in made:
            if not self.start - MIN_LOST_S <= batch.start <= self.stop + MIN_LOST_S:
                continue
            begin = max(batch.start, at)
            end = max(begin, min(batch.stop, self.stop))
            waits = begin - batch.wait_s if begin - at - batch.wait_s >= MIN_LOST_S else at
            for piece in _pieces(at, begin, work, idle):
                if piece.kind == idle:
                    stretches.append(piece)
                else:
                    between = min(max(piece.start, waits), piece.stop)
                    stretches += stretch(piece.kind, piece.start, between) + stretch(pause, between, piece.stop)
            stretches += stretch(batch.kind, begin, end)
            at, idle, pause = end, TAIL, WAITING
        for piece in _pieces(at, self.stop, work, TAIL):
            kind = piece.kind if piece.stop - piece.start >= MIN_LOST_S else TAIL
            if kind == LOST and not self.end:
                kind = unfinished
            elif kind == BACKUP and self.end in FAILED and piece.stop == self.stop:
                kind = LOST
            stretches += stretch(kind, piece.start, piece.stop)
        return stretches


def stretch(kind: str, start: float, stop: float) -> list[Stretch]:
    """A stretch, or none if it has no length."""
    return [Stretch(kind, start, stop)] if stop > start else []


def _pieces(start: float, stop: float, work: Sequence[Stretch], idle: str) -> list[Stretch]:
    """A time, cut into those in which there was work and those in which there was none."""
    pieces: list[Stretch] = []
    at = start
    for period in work:
        begin, end = max(period.start, at), min(period.stop, stop)
        if end > begin:
            pieces += stretch(idle, at, begin) + stretch(period.kind, begin, end)
            at = end
    return pieces + stretch(idle, at, stop)
