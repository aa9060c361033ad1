"""What `status` says of a card."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gaudi_batch.output.progress import sane_progress, without_doings
from gaudi_batch.reporting.status import describe_status

CARD = {"state": "ready", "images": 3, "images_per_s": 1.5, "faults": 0}
COUNTERS = {"watts": 612.4, "temperature_c": 84, "throttled": "thermal"}


def line_of(cards: dict[str, Any]) -> str:
    names = (
        "reason",
        "failed_rows",
        "failures",
        "verify",
        "summary",
        "waits_for",
        "seconds_left",
        "cost",
        "cost_expected",
        "rows_again",
        "images_per_s",
        "progress_time",
    )
    status = dict.fromkeys(names) | {"state": "running", "output": "out", "cards": cards, "faults": [], "rows": 1}
    counts = ("images_committed", "images_planned", "shards_committed", "shards")
    lines = describe_status(status | dict.fromkeys(counts, 1)).splitlines()
    return next(line for line in lines if line.startswith("card"))


@pytest.mark.parametrize(
    ("counters", "end"),
    [
        ({}, ""),
        ({"watts": 399.6, "temperature_c": 61, "throttled": ""}, ", 400 W, 61 °C"),
        (COUNTERS, ", 612 W, 84 °C, throttled: thermal"),
        ({"watts": math.nan, "temperature_c": "hot", "throttled": 7}, ""),
    ],
)
def test_a_card_s_line_has_what_its_counters_say(counters: dict[str, Any], end: str) -> None:
    cards = sane_progress({"cards": {"vm-0": CARD | counters}})["cards"]
    assert line_of(cards) == f"card     vm-0: ready; 3 images, 1.50 images/s, 0 faults{end}"


def test_a_card_of_a_run_that_is_over_draws_nothing() -> None:
    cards = without_doings(sane_progress({"cards": {"vm-0": CARD | COUNTERS}})["cards"])
    assert line_of(cards) == "card     vm-0: ready; 3 images, 1.50 images/s, 0 faults"
