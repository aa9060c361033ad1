"""What a run tells Prometheus, by Ray: every node's agent exports what the processes of that node have recorded.

The driver alone records, also what its cards tell it. Ray labels each series with the process that recorded it, so
cards that did so themselves would leave the series of every process that ever was one.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gaudi_batch.card.messages import CardSetup
from gaudi_batch.card.work import BATCH_BOUNDS_S, CardWork
from gaudi_batch.driver.progress import RunProgress
from gaudi_batch.driver.slot import Slot
from gaudi_batch.redaction import redact
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

MAX_CARDS = 64
"""Cards that have series of their own, those that were seen first; all others are one, named OTHER. Ray's agent keeps
the counters of a driver until its node restarts, so each driver adds its own to what is scraped: 379 at most."""
OTHER = "other"
NAME_LENGTH = 40
"""Characters of an output's name that the label `run` has."""


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric, without the prefix `ray_` that Ray's agent gives it."""

    name: str
    kind: str
    """`counter`, `gauge` or `histogram`."""
    labels: tuple[str, ...]
    """Beside `run`, which each has."""
    description: str


IMAGES_PLANNED = Metric("gaudi_batch_images_planned", "gauge", (), "Images that the run's plan asks for.")
IMAGES_DONE = Metric(
    "gaudi_batch_images_done",
    "gauge",
    (),
    "Images of the run that are committed and not made again, and those in storage of shards that are being made.",
)
FAILED_ROWS = Metric("gaudi_batch_failed_rows", "gauge", (), "Rows of the run that failed.")
SHARDS_PENDING = Metric("gaudi_batch_shards_pending", "gauge", (), "Shards that wait for a card: the queue.")
LEFT = Metric("gaudi_batch_left_seconds", "gauge", (), "Seconds left, as progress.json has them; absent while unknown.")
CARDS = Metric("gaudi_batch_cards", "gauge", ("state",), "Cards by state.")
WATTS = Metric("gaudi_batch_card_watts", "gauge", ("card",), "What the card draws; absent where nobody measures that.")
RETRIES = Metric("gaudi_batch_retries_total", "counter", (), "Attempts at shards that failed.")
FAULTS = Metric("gaudi_batch_faults_total", "counter", ("card",), "Faults of the card.")
IMAGES = Metric(
    "gaudi_batch_images_total",
    "counter",
    ("card",),
    "Images that the card has stored, those of attempts that were dropped included.",
)
GENERATE = Metric(
    "gaudi_batch_generate_seconds_total", "counter", ("card",), "Seconds for which the card's device was generating."
)
WAIT = Metric(
    "gaudi_batch_wait_seconds_total",
    "counter",
    ("card",),
    "Seconds for which the card's device was idle before a batch.",
)
BATCH = Metric(
    "gaudi_batch_batch_seconds",
    "histogram",
    ("phase",),
    "Seconds of a batch on the device, by phase (warmup, steady). Ray estimates its sum from the buckets.",
)
METRICS = (
    IMAGES_PLANNED, IMAGES_DONE, FAILED_ROWS, SHARDS_PENDING, LEFT, CARDS, WATTS,
    RETRIES, FAULTS, IMAGES, GENERATE, WAIT, BATCH,
)  # fmt: skip
"""All of them, as docs/monitoring.md lists them."""


class RunMetrics:
    """The metrics of a run. For the event loop's thread.

    Args:
        setup: the job, as the cards get it.
        schedule: the state of the run, which is only read.
        progress: the progress of the run.
    """

    def __init__(self, setup: CardSetup, schedule: Schedule, progress: RunProgress) -> None:
        self._run = run_label(setup.storage.url, setup.run_id)
        self._schedule = schedule
        self._progress = progress
        self._instruments: Mapping[Metric, Any] = {}
        self._failed = False
        self._counted: Counter[tuple[Metric, str]] = Counter()
        self._seen: dict[int, CardWork] = {}
        self._cards: set[str] = set()

    def record(self, slots: Collection[Slot]) -> None:
        """Records what the run and its cards are at. Once that has failed it does nothing: no run ends for its metrics.

        Args:
            slots: the cards of the run.
        """
        if self._failed:
            return
        try:
            if not self._instruments:
                self._instruments = _instruments()
            self._record_run(slots)
            self._record_cards(slots)
        except Exception as error:
            self._failed = True
            log.warning("Ray takes no more metrics of this run, which goes on without: %s", one_line(error))

    def _record_run(self, slots: Collection[Slot]) -> None:
        self._set(IMAGES_PLANNED, self._progress.images_total)
        self._set(IMAGES_DONE, self._progress.images(slots))
        self._set(FAILED_ROWS, self._schedule.failed_rows)
        self._set(SHARDS_PENDING, self._schedule.pending())
        self._set(LEFT, self._progress.left(slots).seconds)
        states = Counter(self._schedule.state(slot.number) for slot in slots)
        for state in CardState:
            self._set(CARDS, states[state], state.name.lower())
        self._count_up_to(RETRIES, self._schedule.retries)

    def _record_cards(self, slots: Collection[Slot]) -> None:
        # Summed up first: a call of Ray for each of 10,000 cards would hold the loop up for half a second.
        done: defaultdict[tuple[Metric, str], float] = defaultdict(float)
        watts: defaultdict[str, float] = defaultdict(float)
        batches: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for slot in slots:
            if slot.status is None:
                continue
            card, work = self._card(slot.label), slot.status.work
            new = work.since(self._seen.get(slot.number, CardWork()))
            self._seen[slot.number] = work
            done[IMAGES, card] += new.images
            done[GENERATE, card] += new.generate_s
            done[WAIT, card] += new.wait_s
            for phase, counts in new.batches.items():
                batches[phase].update({place: count for place, count in enumerate(counts) if count})
            if slot.status.readings.watts is not None and slot.actor is not None:
                watts[card] += slot.status.readings.watts
        for (metric, card), value in done.items():
            self._add(metric, value, card)
        for phase, by_place in batches.items():
            self._observe(phase, by_place)
        for card, drawn in watts.items():
            self._set(WATTS, drawn, card)
        faults: Counter[str] = Counter()
        for label, count in self._progress.faults.items():
            faults[self._card(label)] += count
        for card, count in faults.items():
            self._count_up_to(FAULTS, count, card)

    def _card(self, label: str) -> str:
        """The label of a card: its name in the records, or OTHER."""
        if label not in self._cards and len(self._cards) >= MAX_CARDS:
            return OTHER
        self._cards.add(label)
        return label

    def _set(self, metric: Metric, value: float | None, *labels: str) -> None:
        self._instruments[metric].set(value, self._labels(metric, labels))  # nothing, if it is None

    def _add(self, metric: Metric, value: float, *labels: str) -> None:
        if value > 0:
            self._instruments[metric].inc(value, self._labels(metric, labels))

    def _count_up_to(self, metric: Metric, total: int, label: str = "") -> None:
        """Adds what a count has grown by."""
        self._add(metric, total - self._counted[metric, label], *filter(None, [label]))
        self._counted[metric, label] = max(total, self._counted[metric, label])

    def _observe(self, phase: str, counts: Mapping[int, int]) -> None:
        observe, labels = self._instruments[BATCH].observe, self._labels(BATCH, (phase,))
        for place, count in counts.items():
            for _ in range(count):
                observe(_MIDDLES[place], labels)

    def _labels(self, metric: Metric, labels: tuple[str, ...]) -> dict[str, str]:
        return {"run": self._run, **dict(zip(metric.labels, labels, strict=True))}


_MIDDLES = (
    *((low + high) / 2 for low, high in zip((0.0, *BATCH_BOUNDS_S), BATCH_BOUNDS_S, strict=False)),
    2 * BATCH_BOUNDS_S[-1],
)
"""A value within each bucket, and one above all of them: Ray, too, counts by bucket and keeps no value."""


def run_label(output: str, run_id: str) -> str:
    """What the label `run` is: the last part of the output's URL, without secrets, and the beginning of the run id,
    which is the same however often the run is resumed. A run of an old version has no id."""
    name = redact(output).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")[:NAME_LENGTH]
    return f"{name or 'run'}-{run_id[:8]}" if run_id else name or "run"


def _instruments() -> dict[Metric, Any]:
    from ray.util.metrics import Counter, Gauge, Histogram

    instruments: dict[Metric, Any] = {}
    for metric in METRICS:
        names = ("run", *metric.labels)
        if metric.kind == "histogram":
            instruments[metric] = Histogram(metric.name, metric.description, [*BATCH_BOUNDS_S], names)
        else:
            kind = Counter if metric.kind == "counter" else Gauge
            instruments[metric] = kind(metric.name, metric.description, names)
    return instruments
