"""What a run tells Prometheus is what it knows, in a number of series that has a bound, and costs the run nothing."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from world import RULES, shards

from gaudi_batch import JobConfig
from gaudi_batch.card.messages import CardStatus
from gaudi_batch.card.readings import Readings
from gaudi_batch.card.work import BATCH_BOUNDS_S, CardWork
from gaudi_batch.dataset.reasons import FailedRows
from gaudi_batch.driver import metrics
from gaudi_batch.driver.metrics import MAX_CARDS, METRICS, OTHER, Metric, RunMetrics, run_label
from gaudi_batch.driver.progress import RunProgress
from gaudi_batch.driver.run_context import Committed
from gaudi_batch.driver.slot import Slot
from gaudi_batch.driver.spending import Spending
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.scheduling import events
from gaudi_batch.scheduling.events import Capacity
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts

CARDS = MAX_CARDS + 20


class Recorded:
    """Stands for an instrument of Ray: keeps what is recorded, by the labels."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.values: defaultdict[Any, float] = defaultdict(float)

    def set(self, value: float | None, tags: dict[str, str]) -> None:
        if value is not None:
            self.values[self._labels(tags)] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray raises"
        self.values[self._labels(tags)] += value

    def observe(self, value: float, tags: dict[str, str]) -> None:
        labels = (*self._labels(tags), value)
        self.values[labels] += 1

    def _labels(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert tuple(tags) == ("run", *self.metric.labels)
        return tuple(tags.values())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[Metric, Recorded]:
    instruments = {metric: Recorded(metric) for metric in METRICS}
    monkeypatch.setattr(metrics, "_instruments", lambda: instruments)
    return instruments


@pytest.fixture
def schedule() -> Schedule:
    schedule = Schedule(shards(3), "a", RowCounts(12), RULES)
    schedule.handle(events.ClusterSeen(Capacity(CARDS, CARDS, frozenset({"node"}), frozenset()), 0.0))
    return schedule


@pytest.fixture
def progress(schedule: Schedule) -> RunProgress:
    no_ledger: Any = None
    committed = Committed(CommitTotals(), FailedRows({}))
    spending = Spending(JobConfig(prompts="p", output="o", device="simulated"), "a")
    return RunProgress(schedule, committed, 12, 0, spending, Timeline(no_ledger, "a"))


@pytest.fixture
def run(schedule: Schedule, progress: RunProgress) -> RunMetrics:
    setup: Any = SimpleNamespace(storage=SimpleNamespace(url="s3://bucket/night"), run_id="0123456789abcdef")
    return RunMetrics(setup, schedule, progress)


def card(number: int, work: CardWork, watts: float | None = None) -> Slot:
    status = CardStatus("idle", 0.0, 0.0, 0, work=work, readings=Readings(watts=watts))
    return Slot(number, name=f"host-{number}", actor=object(), status=status)


RUN = "night-01234567"


def test_counters_grow_by_what_cards_have_done_also_when_a_process_takes_anothers_place(
    run: RunMetrics, recorded: dict[Metric, Recorded]
) -> None:
    first = CardWork().with_batch("warmup", 50.0, 1.0).with_images(8)
    run.record([card(0, first)])
    run.record([card(0, first)])
    more = first.with_batch("steady", 2.0, 0.25).with_batch("steady", 2.5, 0.0).with_images(16)
    run.record([card(0, more)])
    assert recorded[metrics.IMAGES].values == {(RUN, "host-0"): 24}
    run.record([card(0, CardWork())])
    run.record([card(0, CardWork().with_batch("warmup", 4.0, 1.0).with_images(8))])
    assert recorded[metrics.IMAGES].values == {(RUN, "host-0"): 32}
    assert recorded[metrics.GENERATE].values == {(RUN, "host-0"): 58.5}
    assert recorded[metrics.WAIT].values == {(RUN, "host-0"): 2.25}


def test_each_batch_is_in_the_bucket_of_its_seconds(run: RunMetrics, recorded: dict[Metric, Recorded]) -> None:
    seconds = [0.1, *BATCH_BOUNDS_S, BATCH_BOUNDS_S[-1] + 1]
    work = CardWork()
    for taken in seconds:
        work = work.with_batch("steady", taken, 0.0)
    run.record([card(0, work)])
    batches = recorded[metrics.BATCH].values.items()
    observed = sorted(value for (*_, value), count in batches for _ in range(int(count)))
    bounds = (0.0, *BATCH_BOUNDS_S, float("inf"))
    for taken, value in zip(seconds, observed, strict=True):
        low, high = next(pair for pair in itertools.pairwise(bounds) if pair[0] < taken <= pair[1])
        assert low < value <= high


def test_a_run_of_many_cards_has_few_series_and_loses_none_of_their_images(
    run: RunMetrics, progress: RunProgress, recorded: dict[Metric, Recorded]
) -> None:
    slots = [card(number, CardWork().with_batch("steady", 1.0, 0.5).with_images(8), 300.0) for number in range(CARDS)]
    for slot in slots:
        progress.fault(slot, "died")
    for _ in range(3):
        run.record(slots)
    for metric, instrument in recorded.items():
        names = {labels[1] for labels in instrument.values if "card" in metric.labels}
        assert len(names) in (0, MAX_CARDS + 1)
    others = CARDS - MAX_CARDS
    assert sum(recorded[metrics.IMAGES].values.values()) == 8 * CARDS
    assert recorded[metrics.IMAGES].values[RUN, OTHER] == 8 * others
    assert recorded[metrics.WATTS].values[RUN, OTHER] == 300.0 * others
    assert recorded[metrics.FAULTS].values[RUN, OTHER] == others
    assert sum(len(instrument.values) for instrument in recorded.values()) < 6 * (MAX_CARDS + 1)


def test_gauges_say_what_the_run_is_at(run: RunMetrics, recorded: dict[Metric, Recorded]) -> None:
    run.record([card(number, CardWork()) for number in range(CARDS)])
    values = {metric.name: dict(instrument.values) for metric, instrument in recorded.items() if instrument.values}
    assert values == {
        "gaudi_batch_images_planned": {(RUN,): 12},
        "gaudi_batch_images_done": {(RUN,): 0},
        "gaudi_batch_failed_rows": {(RUN,): 0},
        "gaudi_batch_shards_pending": {(RUN,): 3},
        "gaudi_batch_cards": {
            (RUN, state): CARDS if state == "waiting" else 0
            for state in ("waiting", "starting", "ready", "leaving", "quarantined", "gone")
        },
    }, "what nobody knows, such as watts and the time left, is absent"


def test_a_ray_that_takes_no_metrics_costs_the_run_one_line(
    run: RunMetrics, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise RuntimeError("no metrics here")

    monkeypatch.setattr(metrics, "_instruments", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            run.record([])
    assert [record.message for record in caplog.records] == [
        "Ray takes no more metrics of this run, which goes on without: no metrics here"
    ]


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("s3://bucket/runs/2026-11-23/", "2026-11-23-01234567"),
        ("/srv/images/Löwen & Bären", "L-wen-B-ren-01234567"),
        ("https://store/run?X-Amz-Signature=abc123", "run-01234567"),
        (f"s3://bucket/{'x' * 100}", f"{'x' * 40}-01234567"),
    ],
)
def test_a_run_is_named_after_its_output_without_secrets(output: str, label: str) -> None:
    assert run_label(output, "0123456789abcdef") == label
    assert run_label("s3://bucket/old", "") == "old"
