"""Adds up a run's commits by card, for summary.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gaudi_batch.dataset.reasons import reason_lines
from gaudi_batch.layout import IMAGES, REPORT_FILE
from gaudi_batch.output.cost import cost_words, money
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.throughput import ThroughputTotals, rounded
from gaudi_batch.plan import BatchKind
from gaudi_batch.redaction import redact
from gaudi_batch.scheduling.pace import BatchTimes
from gaudi_batch.text import counted, duration, printable

FILES = {
    "images": IMAGES,
    "manifest": "manifest.parquet",
    "throughput": "throughput",
    "summary": "summary.json",
    "report": REPORT_FILE,
}
"""Where everything lies, relative to the output; images in `DATA` if objects have many."""
MAX_KINDS = 100
"""Kinds of batch that summary.json lists: those with the most images."""
CARDS_SHOWN = 16
REASONS_SHOWN = 10


@dataclass
class CardTotals:
    """One card's commits."""

    node: str
    module: int | None
    shards: int = 0
    failed_rows: int = 0
    sums: ThroughputTotals = field(default_factory=ThroughputTotals)
    at_work: list[tuple[float, float]] = field(default_factory=list)
    """Start and end of its work on each commit, waiting included, in seconds since the epoch by the driver's clock."""


class CommitTotals:
    """The commits of a run, added up. Built from the manifests alone, so it agrees with them."""

    def __init__(self) -> None:
        self.attempts: dict[int, str] = {}
        """The committed attempt of each shard."""
        self.rows = 0
        self.failed_rows = 0
        self._images_again = 0
        self.cards: dict[str, CardTotals] = {}
        self._kinds: dict[BatchKind, ThroughputTotals] = {}

    def emptied(self) -> CommitTotals:
        """Totals without commits that know the same cards."""
        other = CommitTotals()
        for name, card in self.cards.items():
            other.card(name, card.node, card.module)
        return other

    def add(self, info: CommitInfo, finished_at: float | None = None, kind: BatchKind | None = None) -> None:
        """Adds one commit; the same shard again changes nothing.

        Args:
            info: of the commit.
            finished_at: when its last image was stored, in seconds since the epoch. Without it the commit counts in all
                but the rate of all cards.
            kind: of its batches. Without it the commit counts in all but the rates of these.
        """
        if info.shard in self.attempts:
            return
        self.attempts[info.shard] = info.attempt
        self.failed_rows += info.failed_rows - info.failed_before
        self._images_again += info.images_before
        if not info.again:
            self.rows += info.rows
        card = self.card(info.card, info.node, info.module)
        card.shards += 1
        card.failed_rows += info.failed_rows
        card.sums += info.sums
        if kind is not None:
            self._kinds[kind] = self._kinds.get(kind, ThroughputTotals()) + info.sums
        if finished_at is not None:
            spent = info.sums.steady_s + info.sums.warmup_s + info.sums.wait_s
            card.at_work.append((finished_at - spent, finished_at))

    def card(self, name: str, node: str, module: int | None) -> CardTotals:
        """The totals of a card; a card without commits has some, too."""
        return self.cards.setdefault(name, CardTotals(node, module))

    @property
    def images(self) -> int:
        """Images of all commits; one that was made again counts once."""
        return sum(card.sums.images for card in self.cards.values()) - self._images_again

    @property
    def images_per_s(self) -> float | None:
        """Images a second of generation, warm-up and waiting left out, of the cards that were at work at one time: the
        sum of their own rates, averaged over the time in which any was at work. Five cards of 1 image/s make 5 beside
        each other and 1 after each other. None before the first steady batch."""
        return self._rate_together(lambda sums: sums.images_per_s)

    @property
    def images_per_s_with_warmup(self) -> float | None:
        """The same with the first batches, which compile; a trial may have no others."""
        return self._rate_together(lambda sums: sums.images_per_s_with_warmup)

    def _rate_together(self, rate_of: Callable[[ThroughputTotals], float | None]) -> float | None:
        rated = [(rate_of(card.sums), card.at_work) for card in self.cards.values()]
        known = [(rate, at_work) for rate, at_work in rated if rate is not None]
        together = length_of_union([stretch for _, at_work in known for stretch in at_work])
        return sum(rate * length_of_union(at_work) for rate, at_work in known) / together if together > 0 else None

    def batch_times(self) -> dict[BatchKind, BatchTimes]:
        """What batches have taken, by kind. How many were warm-up follows from the share of their images."""
        times = {}
        for kind, sums in self._kinds.items():
            steady = round(sums.batches * sums.steady_images / sums.images) if sums.images else 0
            times[kind] = BatchTimes(sums.steady_s, steady, sums.warmup_s, sums.batches - steady)
        return times

    def describe(self, faults: Mapping[str, int], retries: int) -> dict[str, Any]:
        """Totals and cards as summary.json has them.

        Args:
            faults: failures of each card that this driver saw.
            retries: shards that this driver had tried again.
        """
        faults = Counter(faults)
        cards = {
            name: {
                "node": card.node,
                "module": card.module,
                "shards": card.shards,
                "failed_rows": card.failed_rows,
                "faults": faults[name],
                **card.sums.describe(),
            }
            for name, card in sorted(self.cards.items())
        }
        # A card whose counter stood still all the time says nothing of its images.
        of_cards = [card.sums for card in self.cards.values()]
        known = [sums if sums.energy_j > 0 else replace(sums, energy_images=0) for sums in of_cards]
        total = sum(known, ThroughputTotals())
        return {
            "rows": self.rows,
            "failed_rows": self.failed_rows,
            "shards": len(self.attempts),
            "retries": retries,
            **(
                total.describe()
                | {
                    "images": self.images,
                    "images_per_s": rounded(self.images_per_s),
                    "images_per_s_with_warmup": rounded(self.images_per_s_with_warmup),
                }
            ),
            "buckets": [
                {
                    **kind._asdict(),
                    "images": sums.images,
                    "card_images_per_s": rounded(sums.images_per_s),
                    "card_images_per_s_with_warmup": rounded(sums.images_per_s_with_warmup),
                    "warmup_s": rounded(sums.warmup_s),
                }
                for kind, sums in sorted(self._kinds.items(), key=lambda item: -item[1].images)[:MAX_KINDS]
            ],
            "cards": cards,
        }


def is_current(summary: Mapping[str, Any], rows: int, planned: int, committed: int) -> bool:
    """Whether a summary is that of a complete run as it is now. A run that gets rows, or makes rows again, has more
    rows or shards than its last summary says until it is summed up anew, also if its driver is killed before that.

    Args:
        summary: what summary.json says; empty if it is not there.
        rows: of the run.
        planned: shards that are planned.
        committed: shards that are committed.
    """
    says_all = (summary.get("rows_planned", rows), summary.get("shards", planned)) == (rows, planned)
    return str(summary.get("state")).startswith("complete") and says_all and planned == committed


def result_lines(output: str, summary: Mapping[str, Any]) -> list[str]:
    """The outcome of a run, in lines for a person.

    Args:
        output: where it lies.
        summary: what summary.json says.
    """
    lines = [_totals(summary)]
    if summary["images_per_s_wall"] is not None:
        drivers = f", in {len(summary['drivers'])} drivers" if len(summary["drivers"]) > 1 else ""
        lines.append(f"took {duration(summary['wall_s'])}{drivers}: {summary['images_per_s_wall']:.2f} images/s")
    lines += _cost_lines(summary)
    lines.append(f"from {summary['started_at']} to {summary['ended_at']}")
    for name, card in list(summary["cards"].items())[:CARDS_SHOWN]:
        speed = "-" if card["images_per_s"] is None else f"{card['images_per_s']:.2f}"
        busy = "-" if card["busy_share"] is None else f"{card['busy_share']:.1%}"
        spent = f"busy {busy}, warm-up {card['warmup_s']:.1f} s{_energy(card)}"
        lines.append(f"  card {printable(name)}: {card['images']} images, {speed} images/s, {spent}")
    if len(summary["cards"]) > CARDS_SHOWN:
        lines.append(f"  and {len(summary['cards']) - CARDS_SHOWN} more cards, in summary.json")
    lines += failure_lines(summary["failures"])
    where = printable(redact(output))
    return lines + [f"{f'{name}:':<9} {where}/{path}" for name, path in summary["files"].items()]


def _totals(summary: Mapping[str, Any]) -> str:
    rate = ""
    if summary["images_per_s"]:
        rate = f", {summary['images_per_s']:.2f} images/s of generation"
    elif summary["images_per_s_with_warmup"]:
        rate = f", {summary['images_per_s_with_warmup']:.2g} images/s of generation, first batches alone, which compile"
    hours = "" if summary["card_hours"] is None else f", {summary['card_hours']:.2f} card-hours"
    return (
        f"{summary['state']}: {summary['images']} images, {counted(summary['failed_rows'], 'failed row')},"
        f" {counted(len(summary['cards']), 'card')}{rate}{hours}{_energy(summary)}"
    )


def _energy(record: Mapping[str, Any]) -> str:
    joules, each = record["energy_j"], record["joules_per_image"]
    return "" if joules is None or each is None else f", {joules / 1000:,.1f} kJ, {each:,.1f} J an image"


def stop_lines(summary: Mapping[str, Any]) -> list[str]:
    """The state of a run that stopped, in lines for its log."""
    return [_totals(summary), *_cost_lines(summary), *failure_lines(summary["failures"])]


def _cost_lines(summary: Mapping[str, Any]) -> list[str]:
    """What a run cost; nothing if that is not known."""
    each = summary["cost_per_image"]
    of_image = "" if each is None else f", {money(each)} an image"
    return [f"{cost_words(summary['cost'], None)}{of_image}"] if summary["cost"] is not None else []


def failure_lines(failures: list[dict[str, Any]]) -> list[str]:
    """Why rows failed: a line for each of the most frequent reasons."""
    lines = [f"failed: {line}" for line in reason_lines(failures[:REASONS_SHOWN])]
    more = failures[REASONS_SHOWN:]
    rest = sum(group["rows"] for group in more)
    return [*lines, f"failed: {rest} rows for {len(more)} more reasons, in summary.json"] if more else lines


def length_of_union(stretches: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in at least one of the stretches."""
    length, until = 0.0, -math.inf
    for start, stop in sorted(stretches):
        length += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return length
