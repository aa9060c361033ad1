"""progress.json: written by the driver every few seconds, read by `status`."""

from __future__ import annotations

import math
from typing import Any, TypedDict, TypeGuard

from gaudi_batch.dataset.reasons import FIRST_IDS
from gaudi_batch.text import one_line


class CardProgress(TypedDict):
    """One card."""

    node: str | None
    """Its node's host name; None before it has loaded."""
    module: int | None
    pid: int | None
    """Of its process, while there is one."""
    state: str
    """A value of `CardState`."""
    phase: str | None
    """What it does first; the next five fields say more of it. None if it has no part in the run."""
    phase_s: float | None
    limit_s: float | None
    shard: int | None
    bucket: str | None
    rows: str | None
    doing: str | None
    """All that it does, in words."""
    images: int
    """Images that are committed, and those that are stored of shards it still makes."""
    images_per_s: float | None
    faults: int
    watts: float | None
    """This and the next four are what its counters say now; None where nobody knows."""
    temperature_c: float | None
    utilisation: float | None
    """0 to 1."""
    memory_used_mb: float | None
    throttled: str | None
    """Why its clocks are held back; empty if they are not."""
    energy_j: float | None
    """Joules of its committed batches."""


class FaultRecord(TypedDict):
    """A failure of a card."""

    time: str
    card: str
    what: str


class ProgressRecord(TypedDict):
    """The whole file."""

    time: str
    """When it was written, ISO 8601, UTC."""
    state: str
    """`running` or `over`."""
    images: int
    images_total: int
    images_missing: int
    """Images that committed shards were to have and have not, since rows failed."""
    images_left: int
    """Images that are still to be made, those of rows that are run again included."""
    images_again: int
    """Images that manifests name and that are made again, since they are gone or torn; `images` is without them."""
    rows_again: int
    """Rows that are run again and whose shard is not committed. They count neither as made nor as failed."""
    failed_rows: int
    failures: list[dict[str, Any]]
    """Failed rows by reason, as `Reasons.describe` has them."""
    images_per_s: float | None
    seconds_left: int | None
    seconds_left_low: int | None
    """With the next, the range in which that lies; None while too little is known. See `driver/time_left.py`."""
    seconds_left_high: int | None
    shards_pending: int
    retries: int
    drivers: list[dict[str, Any]]
    """The spans of the run's drivers, as `spans.Span` has them."""
    cost: float | None
    """What the run has cost so far; None without a price, or if that of an earlier driver is not known."""
    cost_expected: float | None
    """What it will have cost at the present rate."""
    waits_for: str | None
    cards: dict[str, CardProgress]
    """By label."""
    faults: list[FaultRecord]
    """The last ones."""


_NUMBERS = (
    "images",
    "images_total",
    "images_missing",
    "images_left",
    "images_again",
    "rows_again",
    "failed_rows",
    "images_per_s",
    "seconds_left",
    "seconds_left_low",
    "seconds_left_high",
    "cost",
    "cost_expected",
)
COUNTERS = ("watts", "temperature_c", "utilisation", "memory_used_mb", "throttled")
"""The fields of a card's counters."""
CARD_NUMBERS = ("images", "images_per_s", "faults", "phase_s", "limit_s", "shard", "energy_j", *COUNTERS[:-1])
DOING_FIELDS = ("phase", "phase_s", "limit_s", "shard", "bucket", "rows")
"""The fields of a card for the first thing that it does."""
CARD_TEXTS = ("node", "state", "phase", "bucket", "rows", "doing", "throttled")


def sane_progress(written: dict[str, Any]) -> dict[str, Any]:
    """The content of a progress.json, with null for each value that is not sensible: others may be able to write the
    file."""
    cards, faults = written.get("cards"), written.get("faults")
    return {
        **sane_numbers(written),
        "time": written.get("time"),
        "waits_for": sane_text(written.get("waits_for")),
        "failures": sane_failures(written.get("failures")),
        "cards": {
            name: sane_numbers(card, CARD_NUMBERS) | {name: sane_text(card.get(name)) for name in CARD_TEXTS}
            for name, card in (cards.items() if isinstance(cards, dict) else ())
            if isinstance(card, dict)
        },
        "faults": [
            {name: fault.get(name) for name in ("time", "card", "what")}
            for fault in (faults if isinstance(faults, list) else ())
            if isinstance(fault, dict)
        ],
    }


def without_doings(cards: dict[str, Any]) -> dict[str, Any]:
    """What is said of cards whose driver is over: they do nothing any more."""
    now = dict.fromkeys((*DOING_FIELDS, "doing", *COUNTERS))
    return {name: card | now for name, card in cards.items()}


def sane_failures(written: Any) -> list[dict[str, Any]] | None:
    """Failed rows by reason, as `Reasons.describe` has them; None if the value is not sensible."""
    if not isinstance(written, list):
        return None
    return [
        {
            "reason": one_line(group.get("reason")),
            "rows": group["rows"],
            "first_ids": [one_line(row_id) for row_id in ids[:FIRST_IDS]],
        }
        for group in written
        if isinstance(group, dict)
        and isinstance(group.get("rows"), int)
        and isinstance(ids := group.get("first_ids"), list)
    ]


def sane_text(written: Any) -> str | None:
    """A text as one printable line; None if the value is no text."""
    return one_line(written) if isinstance(written, str) else None


def sane_numbers(written: dict[str, Any], names: tuple[str, ...] = _NUMBERS) -> dict[str, Any]:
    """The values of some names, None for each that is no finite number."""
    return {name: value if is_sane(value := written.get(name)) else None for name in names}


def is_sane(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that a figure may be: finite, and no larger than a float can be."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # of an integer of hundreds of digits
        return False
