"""What progress.json says, in lines. The driver's own log and `status --watch` have them from the same record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from gaudi_batch.output.cost import cost_words
from gaudi_batch.text import counted, duration, one_line

Record = Mapping[str, Any]
"""The content of progress.json: as the driver has it, or as `sane_progress` leaves it, where any value may be None."""

CARDS_SHOWN = 8
"""Cards that have a line of their own in a log."""
GONE = "gone"
"""The state of a card whose node has left the cluster; it is counted no more."""


def progress_fields(record: Record) -> dict[str, Any]:
    """The progress in numbers, for machines."""
    names = ("images", "images_total", "images_left", "images_per_s", "failed_rows", "rows_again")
    left = ("seconds_left", "seconds_left_low", "seconds_left_high", "cost", "cost_expected", "waits_for")
    ready, present = cards_ready(record)
    values = {name: record.get(name) for name in (*names, *left)}
    return {**values, "cards_ready": ready, "cards_present": present}


def progress_line(record: Record) -> str:
    """The progress in one line."""
    ready, present = cards_ready(record)
    cost = f", {words}" if (words := cost_words(record.get("cost"), record.get("cost_expected"))) else ""
    waits = f"; waits for {record['waits_for']}" if record.get("waits_for") else ""
    again = f", {counted(count, 'row')} run again" if (count := record.get("rows_again")) else ""
    failed = record.get("failed_rows")
    rows = f"{'- failed rows' if failed is None else counted(failed, 'failed row')}{again}"
    return (
        f"{number(record.get('images'))}/{number(record.get('images_total'))} images,"
        f" {rate(record.get('images_per_s'))} images/s, {ready}/{present} cards,"
        f" {rows}, {time_left(record)}{cost}{waits}"
    )


def time_left(record: Record) -> str:
    """How long it takes, and in which range that lies."""
    low, high = record.get("seconds_left_low"), record.get("seconds_left_high")
    text = f"{duration(record.get('seconds_left'))} left"
    if low is None or high is None or duration(low) == duration(high):
        return text
    return f"{text} ({duration(low)} to {duration(high)})"


def cards_ready(record: Record) -> tuple[int, int]:
    """How many cards are ready, and how many there are."""
    states = Counter(card.get("state") for card in record["cards"].values())
    return states["ready"], states.total() - states[GONE]


def card_lines(record: Record) -> list[str]:
    """What the cards are doing: a line for each of at most `CARDS_SHOWN` cards, the nearest to their limits first, and
    one line for all others."""
    busy = {name: card for name, card in record["cards"].items() if card.get("doing")}
    names = list(busy)
    if len(names) > CARDS_SHOWN:
        names.sort(key=lambda name: -share_of_limit(busy[name]))
    lines = [f"card {name}: {busy[name]['doing']}" for name in names[:CARDS_SHOWN]]
    phases = Counter(str(busy[name].get("phase")) for name in names[CARDS_SHOWN:])
    if phases:
        lines.append(f"{phases.total()} more cards: {counts(phases)}")
    return lines


def counts(of: Counter[str]) -> str:
    """How many there are of each, the most first."""
    return ", ".join(f"{count} {what}" for what, count in of.most_common())


def share_of_limit(card: Mapping[str, Any]) -> float:
    """How much has passed of the time after which a card is killed for what it does; 0 where there is no such time."""
    seconds, limit = card.get("phase_s"), card.get("limit_s")
    return seconds / limit if seconds and limit else 0.0


def number(value: float | None) -> str:
    """A number that may be unknown."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def rate(value: float | None) -> str:
    """Images a second."""
    return "-" if value is None else f"{value:.2f}"


def fault_line(fault: Mapping[str, Any]) -> str:
    """A fault of a card, with its time of day in UTC."""
    when = str(fault.get("time"))[11:]
    return one_line(f"{when or '-'} {fault.get('card')}: {fault.get('what')}")
