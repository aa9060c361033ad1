"""The view fits its terminal, shows the worst cards first, and takes everything for text."""

from __future__ import annotations

import io
import random
from typing import Any

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from gaudi_batch.output.progress import sane_progress
from gaudi_batch.reporting.view import RunView
from gaudi_batch.text import short_hosts

HOSTILE = "[red]red[/] \x1b[31m\x9b2J\r\n\u202eevil"


def card(number: int, **fields: Any) -> dict[str, Any]:
    at_work = {"phase": "batch", "phase_s": 4.0, "limit_s": 200.0, "doing": f"batch, row {number}, 4 s of 200 s"}
    return {"state": "ready", **at_work, "images": number, "images_per_s": 1.0 + number / 1e4, "faults": 0, **fields}


def record(cards: int, **fields: Any) -> dict[str, Any]:
    faults = [{"time": f"2026-01-01T00:00:{number:02d}Z", "card": "host-3", "what": HOSTILE} for number in range(9)]
    written = {
        "time": "2026-01-01T00:01:00Z",
        "images": 312,
        "images_total": 1000,
        "images_per_s": 6.92,
        "failed_rows": 3,
        "seconds_left": 9900,
        "seconds_left_low": 9200,
        "seconds_left_high": 10800,
        "cards": {f"host-{number:04d}": card(number) for number in range(cards)},
        "faults": faults,
    }
    return sane_progress(written | fields)


def on_screen(view: RunView, columns: int, rows: int) -> list[str]:
    """What a terminal shows."""
    text = io.StringIO()
    Console(file=text, force_terminal=True, width=columns, height=rows, legacy_windows=False).print(view)
    screen = pyte.Screen(columns, rows)
    pyte.Stream(screen).feed(text.getvalue().replace("\n", "\r\n"))
    return [line.rstrip() for line in screen.display]


@pytest.mark.parametrize(("columns", "rows"), [(60, 20), (80, 24), (120, 40), (200, 60)])
@pytest.mark.parametrize("cards", [1, 8, 64, 1000])
def test_the_view_fits_its_terminal(cards: int, columns: int, rows: int) -> None:
    names = list(record(cards)["cards"])
    drawn = on_screen(RunView(record(cards), 1.0, "s3://bucket/out: running", ("a note",)), columns, rows)
    assert drawn[0] == "s3://bucket/out: running", "nothing has scrolled away"
    assert drawn[1].endswith("31.2 %")
    assert any("2 h 45 min left (2 h 33 min to 3 h 00 min)" in line for line in drawn)
    assert "a note" in drawn
    listed = [name for name in names if any(line.startswith(name[-columns // 4 :]) for line in drawn)]
    more = [line for line in drawn if line.startswith("and ")]
    if more:
        assert more == [f"and {cards - len(listed)} more: {cards - len(listed)} ready"]
        assert len(listed) >= rows - 13
    else:
        assert listed == names
    last = [line for line in drawn if line][-1]
    assert last.startswith("fault 00:00:08Z host-3: [red]red[/] \\x1b[31m"[: columns - 1])


def test_the_worst_cards_come_first() -> None:
    told = record(200)
    cards = told["cards"]
    cards["host-0011"] = card(11, phase_s=1500.0, limit_s=1800.0, doing="first batch, 1500 s of 1800 s")
    cards["host-0022"] = card(22, state="quarantined", doing=None, phase_s=None, limit_s=None)
    cards["host-0033"] = card(33, faults=2)
    cards["host-0044"] = card(44, state="starting", images_per_s=None)
    cards["host-0055"] = card(55, images_per_s=0.2)
    cards["host-0066"] = card(66, state="gone", faults=9, doing=None)
    cards["host-0077"] = card(77, throttled="thermal")
    cards["host-0088"] = card(88, state="waiting for the cluster", images_per_s=None, doing="waiting, no 1 HPU is free")
    drawn = on_screen(RunView(told, 1.0), 100, 24)
    table = drawn[next(place for place, line in enumerate(drawn) if line.startswith("card")) + 1 :]
    order = [line[:9] for line in table if line.startswith("host-")]
    assert order[:7] == [f"host-00{number}" for number in (11, 22, 33, 77, 44, 55)] + ["host-0000"]
    more = next(line for line in table if line.startswith("and "))
    assert more.endswith("ready, 1 waiting for the cluster, 1 gone")


def test_temperature_and_watts_are_there_once_a_card_knows_them() -> None:
    assert "°C" not in "".join(on_screen(RunView(record(2), 1.0), 80, 24))
    told = record(2)
    told["cards"]["host-0001"] |= {"temperature_c": 61.4, "watts": 402.6}
    drawn = on_screen(RunView(told, 1.0), 80, 24)
    header = next(line for line in drawn if line.startswith("card"))
    assert header.split()[-5:] == ["images", "images/s", "°C", "W", "faults"]
    assert next(line for line in drawn if line.startswith("host-0001")).split()[-3:] == ["61", "403", "0"]
    assert next(line for line in drawn if line.startswith("host-0000")).split()[-3:] == ["-", "-", "0"]


def test_a_hundred_percent_is_for_what_is_complete() -> None:
    almost = on_screen(RunView(record(1, images=99_999, images_total=100_000), 1.0), 80, 24)
    assert almost[0].endswith(" 99.9 %")
    complete = on_screen(RunView(record(1, images=4, images_missing=1, images_total=5), 1.0), 80, 24)
    assert complete[0].endswith("100.0 %"), "a row has failed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("time", "images", "images_total", "images_per_s", "seconds_left", "seconds_left_low", "waits_for", "faults")
CARD_FIELDS = ("state", "doing", "phase_s", "limit_s", "images", "images_per_s", "faults", "watts", "throttled")


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON)),
    st.dictionaries(st.text(max_size=40), st.fixed_dictionaries({}, optional=dict.fromkeys(CARD_FIELDS, JSON))),
    st.integers(20, 200),
    st.integers(4, 60),
)
def test_whatever_stands_in_progress_json_the_view_keeps_to_its_place(
    written: dict[str, Any], cards: dict[str, Any], width: int, height: int
) -> None:
    rng = random.Random(0)
    named = {f"{name}{HOSTILE if rng.random() < 0.2 else ''}": each for name, each in cards.items()}
    lines = RunView(sane_progress(written | {"cards": named}), 1.0, HOSTILE, (HOSTILE,)).lines(width, height)
    assert len(lines) <= height
    for line in lines:
        assert cell_len(line.plain) <= width
        assert line.plain.isprintable()


def test_hosts_are_shown_without_the_domain_that_they_share() -> None:
    hosts = ["a.x.example.com", "b.x.example.com", ""]
    assert short_hosts(hosts) == {"a.x.example.com": "a", "b.x.example.com": "b"}
    assert short_hosts(["a.x.com", "a.y.com"]) == {"a.x.com": "a.x", "a.y.com": "a.y"}
    assert short_hosts(["vm", "a.x"]) == {"vm": "vm", "a.x": "a.x"}
    assert short_hosts(["one.x.com"]) == {"one.x.com": "one.x.com"}
    assert short_hosts(["10.0.0.1", "10.0.1.1"]) == {}
