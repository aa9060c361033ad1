"""What each card is doing, for how long, and whether that is longer than usual."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gaudi_batch.card.messages import CardStatus
from gaudi_batch.driver.slot import Slot
from gaudi_batch.driver.watchdog import PhaseRules, phase_limit, reading_limit, storage_limit
from gaudi_batch.output.progress import DOING_FIELDS
from gaudi_batch.scheduling.cards import CardState

USUAL_MAX_S = 20.0
"""Seconds that reading a shard's rows, or one operation on storage, takes at most where all is well."""
USUAL_FACTOR = 3.0
"""Something counts as slow once it has taken this many times its usual time."""
SOON_S = 30.0
"""Nothing that has taken less than these seconds counts as slow."""
LIMIT_SHARE = 0.5
"""Something counts as slow once this share of its limit has passed, whatever is usual."""
WAITS_SAID = 5
"""Lines about slow things at one look."""


@dataclass(frozen=True)
class Doing:
    """One thing that a card is at."""

    phase: str
    """`waiting`, `starting`, `loading`, `idle`, `reading`, `first batch`, `batch`, `encoding`, `storing`,
    `asking storage` or `silent`."""
    seconds: float
    """For how long."""
    limit: float | None = None
    """Seconds after which the card is killed for it; None where there is no such limit."""
    usual: float | None = None
    """Seconds that it usually takes at most; None if nobody knows yet."""
    shard: int | None = None
    bucket: str | None = None
    """Size of the batch's images, as 512x512."""
    rows: tuple[int, ...] = ()
    """Rows of the batch; none if the card repeats an image to check itself."""
    note: str = ""

    @property
    def unusual(self) -> bool:
        """Whether it takes longer than is usual."""
        return self.seconds >= self.threshold

    @property
    def threshold(self) -> float:
        """Seconds after which it has taken longer than is usual."""
        half = float("inf") if self.limit is None else LIMIT_SHARE * self.limit
        several = float("inf") if self.usual is None else max(SOON_S, USUAL_FACTOR * self.usual)
        return min(half, several)

    def describe(self) -> dict[str, Any]:
        """As progress.json has it."""
        rows = _numbers(self.rows) or None
        values = (self.phase, round(self.seconds, 1), self.limit, self.shard, self.bucket, rows)
        return dict(zip(DOING_FIELDS, values, strict=True))

    def __str__(self) -> str:
        what = self.phase if self.bucket is None else f"{self.phase} of {self.bucket}"
        if self.rows:
            what += f", row{'s' if len(self.rows) > 1 else ''} {_numbers(self.rows)}"
        elif self.shard is not None:
            what += f", shard {self.shard}"
        of = "" if self.limit is None else f" of {self.limit:.0f} s"
        return f"{what}{f', {self.note}' if self.note else ''}, {self.seconds:.0f} s{of}"


def _numbers(rows: Sequence[int]) -> str:
    if not rows:
        return ""
    return f"{rows[0]}" if len(rows) == 1 else f"{min(rows)} to {max(rows)}"


def doings_of(status: CardStatus, since_seen: float, rules: PhaseRules) -> list[Doing]:
    """What a card is doing, by its last answer; what its device does, or waits for, comes first.

    Args:
        status: the answer.
        since_seen: seconds since then.
        rules: how long things may and do take.
    """
    config, times = rules.config, rules.times
    beside = []
    if status.storing and not status.storage_s:
        beside.append(Doing("encoding", status.storing_s + since_seen, note=f"{status.storing} images"))
    elif status.storage_s and (status.storing or not status.reading_s):
        phase, note = ("storing", f"{status.storing} images") if status.storing else ("asking storage", "")
        seconds = status.storage_s + since_seen
        beside.append(Doing(phase, seconds, storage_limit(config), USUAL_MAX_S, note=note))
    if status.reading_s > 0:
        seconds = status.reading_s + since_seen
        beside.append(Doing("reading", seconds, reading_limit(config), USUAL_MAX_S, status.reading_shard))
    if status.phase != "idle":
        kind = status.kind
        name, limit = phase_limit(status, config, times)
        bucket = f"{kind.width}x{kind.height}" if kind is not None else None
        usual = times.loading if name == "loading" else times.usual(status.phase, kind)
        seconds = status.phase_s + since_seen
        return [Doing(status.phase, seconds, limit, usual, status.shard, bucket, status.rows), *beside]
    if since_seen > rules.poll_s + SOON_S / 2:
        return [Doing("silent", since_seen, rules.poll_s + config.limits.answer)]
    return beside or [Doing("idle", status.phase_s + since_seen)]


def doings(slot: Slot, state: CardState, now: float, rules: PhaseRules) -> list[Doing]:
    """What the card of a slot is doing; empty if it has no part in the run.

    Args:
        slot: the slot.
        state: where its card is in its life.
        now: monotonic.
        rules: how long things may and do take.
    """
    if state is CardState.WAITING:
        return [Doing("waiting", now - slot.since, note=f"no {rules.need} is free")]
    if state in (CardState.GONE, CardState.QUARANTINED):
        return []
    if slot.actor is None:
        return [Doing("starting", now - slot.last_seen, usual=USUAL_MAX_S)]
    if slot.status is None:
        return [Doing("loading", now - slot.last_seen, rules.config.limits.loading, rules.times.loading)]
    current = doings_of(slot.status, now - slot.last_seen, rules)
    if slot.up and state is CardState.STARTING:
        return [Doing("idle", current[0].seconds, note="waiting for what the other cards have")]
    return current


def describe_doings(current: Sequence[Doing]) -> str:
    """What a card is doing: its first activity, and others that are slow."""
    return "; ".join(str(doing) for place, doing in enumerate(current) if place == 0 or doing.unusual)


def waits_for(cards: Iterable[Sequence[Doing]], ready: int, storage_s: float, need: str) -> str | None:
    """What the run as a whole waits for; None while it goes on.

    Args:
        cards: what each card is at.
        ready: how many cards work.
        storage_s: seconds for which the driver's oldest operation on storage has been going on.
        need: what a card takes of the cluster.
    """
    if storage_s > USUAL_MAX_S:
        return f"storage, which the driver has asked for {storage_s:.0f} s"
    if ready:
        return None
    phases = Counter(current[0].phase for current in cards if current)
    parts = [f"{count} {phase}" for phase, count in phases.most_common()]
    if "waiting" in phases:
        parts.append(f"no {need} is free")
    return f"a card: {', '.join(parts)}" if parts else "a card"


class Watch:
    """Reports slow things: once, and again each time they have taken twice as long."""

    def __init__(self) -> None:
        self._next: dict[tuple[Any, ...], float] = {}

    def due(self, cards: Mapping[str, Sequence[Doing]]) -> list[str]:
        """The lines to log now: at most `WAITS_SAID` and one more, the slowest first.

        Args:
            cards: what each card is at, by its name.
        """
        before, self._next = self._next, {}
        due_lines: list[tuple[str, Doing]] = []
        for name, at in cards.items():
            for doing in at:
                if doing.phase == "waiting":
                    continue  # one line for all of them
                key = (name, doing.phase, doing.shard, doing.rows)
                self._next[key] = before.get(key, doing.threshold)
                if doing.seconds >= self._next[key]:
                    self._next[key] = 2 * doing.seconds
                    due_lines.append((name, doing))
        due_lines.sort(key=lambda item: -item[1].seconds)
        lines = [f"card {name}: {doing}; that is longer than is usual" for name, doing in due_lines[:WAITS_SAID]]
        more = len(due_lines) - WAITS_SAID
        return [*lines, f"{more} more cards take longer than is usual"] if more > 0 else lines
