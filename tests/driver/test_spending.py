"""What a run costs, by hand, and when its budget or its deadline is reached."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from gaudi_batch.config.deadline import parse_deadline
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.driver.slot import Slot, held_of_cluster
from gaudi_batch.driver.spending import Spending
from gaudi_batch.errors import InputError
from gaudi_batch.output.cost import Price, cost_words, money
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.spans import Held, Span, whole_cost
from gaudi_batch.storage.store import Storage

HOUR = 3600.0
BY_CARD, BY_NODE = Price(2.0, "card"), Price(10.0, "node")


def a_job(**fields: Any) -> JobConfig:
    return JobConfig(prompts="p", output="o", device="simulated", **fields)


def a_span(card_s: float | None, node_s: float | None = None, cost: float | None = None) -> Span:
    return Span("a", "2026-11-01T00:00:00+00:00", "2026-11-01T01:00:00+00:00", HOUR, card_s, node_s, cost)


def test_a_node_is_held_from_its_first_card_to_its_last() -> None:
    slots = [
        Slot(0, node_id="A", placed=0.0, given_back=50.0),
        Slot(1, node_id="A", placed=20.0, given_back=60.0),
        Slot(2, node_id="A", placed=90.0),
        Slot(3, node_id="B", placed=70.0),
        Slot(4, node_id="B", placed=75.0),
        Slot(5),
    ]
    assert held_of_cluster(slots, 100.0) == Held(card_s=50 + 40 + 10 + 30 + 25, node_s=60 + 10 + 30, cards=3, nodes=2)
    assert held_of_cluster([Slot(0)], 100.0) == Held()


def test_a_driver_costs_what_its_own_price_said() -> None:
    spans = [a_span(3 * HOUR, HOUR, cost=6.0), a_span(HOUR, HOUR, cost=1.0)]
    assert whole_cost(spans, BY_CARD) == 7.0, "the price was lower later"
    unpriced = a_span(2 * HOUR, HOUR)
    assert whole_cost([*spans, unpriced], BY_CARD) == 7.0 + 4.0
    assert whole_cost([*spans, unpriced], BY_NODE) == 7.0 + 10.0
    assert whole_cost([*spans, unpriced], None) is None
    assert whole_cost([*spans, a_span(HOUR)], BY_NODE) is None, "an older version wrote no times of nodes down"
    assert whole_cost([], BY_CARD) is None


def test_a_budget_counts_all_drivers_and_is_reached_once() -> None:
    spending = Spending(a_job(price_per_card_hour=2.0, budget=10.0), "b")
    spending.earlier = [a_span(4 * HOUR, cost=8.0)]
    assert spending.examine(Held(card_s=0.99 * HOUR)) is None
    reached = spending.examine(Held(card_s=1.01 * HOUR))
    assert reached is not None
    assert reached.reason == "the budget of 10 is reached at 10.02"
    assert reached.way_out == "the same command with a larger budget resumes"
    assert spending.examine(Held(card_s=2 * HOUR)) is None
    assert spending.reached == reached


def test_what_an_older_version_cost_is_missing_from_a_budget_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = {name: value for name, value in dataclasses.asdict(a_span(None)).items() if name not in ("node_s", "cost")}
    (tmp_path / "summary.json").write_text(json.dumps({"drivers": [old]}))
    ledger = OutputReader(Storage(str(tmp_path)))
    Spending(a_job(price_per_card_hour=2.0), "b").read_earlier(ledger)
    assert not caplog.messages
    spending = Spending(a_job(price_per_card_hour=2.0, budget=1.0), "b")
    spending.read_earlier(ledger)
    assert "what 1 earlier driver of this run cost is not known" in caplog.text
    assert spending.cost(Held(card_s=HOUR)) is None
    assert spending.examine(Held(card_s=HOUR)) is not None


def test_the_rest_is_expected_to_cost_what_is_held_now() -> None:
    spending = Spending(a_job(price_per_node_hour=10.0), "b")
    held = Held(card_s=9 * HOUR, node_s=2 * HOUR, cards=8, nodes=1)
    assert spending.expected(held, 0.5 * HOUR) == 25.0
    assert spending.expected(held, None) is None
    assert Spending(a_job(), "b").expected(held, HOUR) is None


@pytest.mark.parametrize(
    ("text", "length"),
    [("8h", 8 * HOUR), ("90m", 5400.0), ("30s", 30.0), ("1h30m", 5400.0), ("1.5d", 36 * HOUR), ("0.5s", 0.5)],
)
def test_a_length_of_time_is_counted_from_the_start_of_the_command(text: str, length: float) -> None:
    assert parse_deadline(text) == timedelta(seconds=length)
    spending = Spending(a_job(deadline=text), "b")
    spending.watch._since -= length - 0.4
    assert spending.examine(Held()) is None
    spending.watch._since -= 0.5
    reached = spending.examine(Held())
    assert reached is not None
    assert (reached.reason, reached.way_out) == (f"the deadline of {text} is reached", "the same command resumes")


def test_a_time_that_is_over_is_refused_and_one_to_come_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 12, 1, 7, 0, 0, tzinfo=timezone.utc)
    monkeypatch.setattr("gaudi_batch.driver.spending._now", lambda: now)
    for over in ("2026-12-01T07:00:00Z", "2026-12-01T08:00:00+01:00"):
        with pytest.raises(InputError, match="is over, it is 2026-12-01T07:00:00"):
            Spending(a_job(deadline=over), "b").refuse_if_over()
    spending = Spending(a_job(deadline="2026-12-01T08:00:01+01:00"), "b")
    spending.refuse_if_over()
    assert spending.examine(Held()) is None
    now += timedelta(seconds=1)
    reached = spending.examine(Held())
    assert reached is not None
    assert reached.reason == "the deadline, 2026-12-01T08:00:01+01:00, is reached"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 3}, "budget: 3 is .* name price_per_card_hour or price_per_node_hour"),
        ({"price_per_card_hour": 1, "price_per_node_hour": 8}, "name one of them"),
        ({"price_per_card_hour": -1}, "price_per_card_hour: -1: "),
        ({"budget": 0, "price_per_card_hour": 1}, "budget: 0: "),
        ({"deadline": "2026-12-01T08:00:00"}, "deadline: '2026-12-01T08:00:00': must be a time with its zone"),
        ({"deadline": datetime(2026, 12, 1, 8)}, "must be a time with its zone"),
        ({"deadline": "2026-12-01"}, "must be a time with its zone"),
        ({"deadline": 8}, "deadline: 8: must be a time with its zone"),
        ({"deadline": "0h"}, "a length of time more than 0"),
        ({"deadline": "1700000000"}, "must be a time with its zone"),
    ],
)
def test_what_is_no_price_budget_or_deadline_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        a_job(**fields)


def test_a_time_as_yaml_reads_it_is_a_deadline(write_prompts: Callable[..., Path], tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("prompts: p\noutput: o\ndevice: simulated\ndeadline: 2126-12-01T08:00:00+01:00\n")
    assert parse_deadline(JobConfig.load(job).deadline or "") == datetime(2126, 12, 1, 7, tzinfo=timezone.utc)


def test_sums_of_money_are_as_people_write_them() -> None:
    amounts = (0, 12.345, 1234567.891, 0.5, 0.0123, 0.000456)
    assert [money(amount) for amount in amounts] == ["0.00", "12.35", "1234567.89", "0.50", "0.012", "0.00046"]
    assert cost_words(1.5, 12.0) == "cost 1.50 of about 12.00"
    assert (cost_words(1.5, None), cost_words(None, 3.0)) == ("cost 1.50", "")
    assert str(BY_CARD) == "2.00 a card-hour"
