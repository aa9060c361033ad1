"""What a card was at in the life of one of its processes: its batches, and what lies between them."""

from __future__ import annotations

import math
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
MIN_IDLE_S = 1.0
"""A card that gets its first shard later than this after it could have had one was idle until then."""
IDLE = (START, TAIL)


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
    attempt: str
    """The attempt at a shard that it is of."""


@dataclass
class Up:
    """A time in which one process of a card worked."""

    start: float
    stop: float
    end: str = ""
    """The line that ended it; none where the driver ended, or goes on."""
    changes: list[tuple[float, str]] = field(default_factory=list)
    """The lines `works`, `backup` and `idle`."""
    failed_at: float = -math.inf
    """When an attempt of it last failed, or was ended."""
    overtaken_at: float = -math.inf
    """When another card last overtook a backup attempt of it."""

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

    def holds(self, batch: Made) -> bool:
        """Whether a batch was made in it. Clocks are read one after the other, so it may seem to begin before."""
        return batch.stop >= self.start and batch.start <= self.stop

    def fill(self, made: Iterable[Made], work: Sequence[Stretch], unfinished: str, begun: float) -> list[Stretch]:
        """All that the card was at, in order.

        Args:
            made: its batches, in order; those of other processes are passed over.
            work: the times in which it had work.
            unfinished: what work is that had not ended with the driver, or goes on.
            begun: when a card of the same driver first had work.
        """
        stretches: list[Stretch] = []
        pieces = self._pieces(work, begun)
        at, pause, attempt = self.start, START, ""
        for batch in filter(self.holds, made):
            begin = max(batch.start, at)
            end = max(begin, min(batch.stop, self.stop))
            waits = begin - batch.wait_s if begin - at - batch.wait_s >= MIN_LOST_S else at
            # A shard can be committed after the next one: while another card has to confirm what failed of it.
            is_open = not self.end and batch.attempt != attempt and at >= self.failed_at
            for piece in _between(at, begin, pieces):
                if piece.kind in IDLE:
                    stretches.append(piece)
                else:
                    between = min(max(piece.start, waits), piece.stop)
                    kind = unfinished if is_open and piece.kind == LOST else piece.kind
                    stretches += stretch(kind, piece.start, between) + stretch(pause, between, piece.stop)
            stretches += stretch(batch.kind, begin, end)
            at, pause, attempt = end, WAITING, batch.attempt
        for piece in _between(at, self.stop, pieces):
            kind = self._last_kind(piece, unfinished)
            if kind not in (*IDLE, UNCOMMITTED) and piece.stop - piece.start < MIN_LOST_S:
                kind = TAIL
            stretches += stretch(kind, piece.start, piece.stop)
        return stretches

    def _last_kind(self, piece: Stretch, unfinished: str) -> str:
        """What a piece is that follows all batches."""
        goes_on = piece.kind == BACKUP and piece.stop == self.stop
        if goes_on and self.end in FAILED:
            return LOST
        if not self.end and (piece.kind == LOST or (goes_on and self.overtaken_at < piece.start)):
            return unfinished
        return piece.kind

    def _pieces(self, work: Sequence[Stretch], begun: float) -> list[Stretch]:
        """Its whole time, cut into that in which it had work and that in which it was idle: at its start, until there
        was any work, and else since nothing was left to begin."""
        first = work[0].start if work else self.stop
        at = max(self.start, min(begun, first))
        if work and first - at < MIN_IDLE_S:
            at = first
        pieces = stretch(START, self.start, at)
        for period in work:
            pieces += [*stretch(TAIL, at, period.start), period]
            at = period.stop
        return pieces + stretch(TAIL, at, self.stop)


def stretch(kind: str, start: float, stop: float) -> list[Stretch]:
    """A stretch, or none if it has no length."""
    return [Stretch(kind, start, stop)] if stop > start else []


def _between(start: float, stop: float, pieces: Iterable[Stretch]) -> list[Stretch]:
    """What lies between two moments."""
    return [part for kind, *of in pieces for part in stretch(kind, max(of[0], start), min(of[1], stop))]
