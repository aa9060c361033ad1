"""`check` says what a job is expected to cost, and warns where it would be stopped before its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gaudi_batch.cli import main as cli
from gaudi_batch.cli.expected_cost import Work, money_lines
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.driver.spending import Spending
from gaudi_batch.output.spans import Span

HOUR = 3600.0
EARLIER = Span("a", "2026-11-01T00:00:00+00:00", "2026-11-01T01:00:00+00:00", HOUR, HOUR, HOUR, 4.0)
"""A driver that cost 4."""


def lines(work: Work, earlier: tuple[Span, ...] = (), used: dict[str, Any] | None = None, **fields: Any) -> list[str]:
    spending = Spending(JobConfig(prompts="p", output="o", device="simulated", **fields), "b")
    spending.earlier = earlier
    return money_lines(work, spending, used or {})


def test_the_cost_follows_from_the_time_and_the_price() -> None:
    by_card = "at 2.00 a card-hour, loading and warm-up left out"
    assert lines(Work(40 * HOUR, 16)) == []
    assert lines(Work(40 * HOUR, 16), price_per_card_hour=2) == [f"cost     about 80.00 ({by_card})"]
    assert lines(Work(40 * HOUR, None), price_per_card_hour=2) == [f"cost     about 80.00 ({by_card})"]
    assert lines(Work(40 * HOUR, 16, is_whole=False), (EARLIER,), price_per_card_hour=2) == [
        f"cost     more than 80.00 ({by_card}); 4.00 so far, more than 84.00 in all"
    ]
    assert lines(Work(None, 16), (EARLIER,), price_per_card_hour=2) == [
        "cost     not known, as the time is not; 4.00 so far"
    ]
    assert lines(Work(0.0, 16), (EARLIER,), price_per_card_hour=2, budget=3) == [
        f"cost     about 0.00 ({by_card}); 4.00 so far, about 4.00 in all"
    ], "nothing is left that a budget could stop"


def test_cards_without_work_are_paid_to_the_end() -> None:
    work = Work(40 * HOUR, 4, held=6)
    idle = "loading and warm-up left out, 2 cards without work paid, too"
    assert lines(work, price_per_card_hour=2) == [f"cost     about 120.00 (at 2.00 a card-hour, {idle})"]
    assert lines(Work(40 * HOUR, 4, held=12), price_per_node_hour=10) == [
        "cost     about 200.00 (at 10.00 a node-hour, 2 nodes of 8 cards, loading and warm-up left out, 8 cards without"
        " work paid, too)"
    ]


def test_nodes_are_those_that_the_cards_fill() -> None:
    by_node = "at 10.00 a node-hour, {} cards, loading and warm-up left out"
    assert lines(Work(36 * HOUR, 9), price_per_node_hour=10) == [
        f"cost     about 80.00 ({by_node.format('2 nodes of 8')})"
    ], "four hours of two nodes"
    used = {f"{node}-{card}": {"node": node} for node in "ABC" for card in range(3)}
    assert lines(Work(36 * HOUR, 9), (), used, price_per_node_hour=10) == [
        f"cost     about 120.00 ({by_node.format('3 nodes of 3')})"
    ]


def test_a_job_that_would_be_stopped_is_warned_of() -> None:
    assert lines(Work(40 * HOUR, 8), price_per_card_hour=2, budget=83)[1:] == []
    assert lines(Work(40 * HOUR, 8), (EARLIER,), price_per_card_hour=2, budget=83)[1:] == [
        "budget   83 is less than that: the run would stop before its end"
    ]
    assert lines(Work(None, 8), (EARLIER,), price_per_card_hour=2, budget=4)[1:] == [
        "budget   4 is used up: the run would stop at once"
    ]
    assert lines(Work(40 * HOUR, 8), deadline="5h1m") == []
    assert lines(Work(40 * HOUR, None), deadline="1h") == []
    assert lines(Work(40 * HOUR, 8), deadline="2020-01-01T00:00:00Z") == [
        "deadline is over: the run would stop at once"
    ]
    assert lines(Work(0.0, 8), deadline="2020-01-01T00:00:00Z") == []
    (line,) = lines(Work(40 * HOUR, 8), deadline="4h")
    assert line.startswith("deadline is in ")
    assert line.endswith(", and the rest takes about 5 h 00 min: the run would stop before its end")


def test_check_prints_it_and_refuses_a_deadline_that_is_over(
    write_prompts: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["check", "--prompts", str(write_prompts({"prompt": 16 * ["a"]})), "--output", str(tmp_path / "out")]
    job += ["--device", "simulated", "--simulated.batch-seconds", "3600", "--cards", "2", "--price-per-card-hour", "9"]
    assert cli.main([*job, "--budget", "17", "--deadline", "30m"]) == 0
    time, cost, budget, deadline = capsys.readouterr().out.splitlines()[-4:]
    assert time.startswith("time     about 1 h 00 min on 2 cards")
    assert cost.startswith("cost     about 18.00 (at 9.00 a card-hour")
    assert (budget[:11], deadline[:14]) == ("budget   17", "deadline is in")
    assert cli.main([*job, "--deadline", "2020-01-01T00:00:00Z"]) == 2
    assert "deadline: 2020-01-01T00:00:00Z is over, it is 2" in capsys.readouterr().err
