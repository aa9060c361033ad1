"""What is shown while a run goes on: a line now and then, or a view, and log lines where they belong."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from gaudi_batch.reporting.json_log import JsonFormatter
from gaudi_batch.reporting.progress_text import CARDS_SHOWN, card_lines, progress_line
from gaudi_batch.reporting.terminal import LineView

CARDS: dict[str, Any] = {
    "a": {"state": "ready", "doing": "batch"},
    "b": {"state": "ready", "doing": None},
    "c": {"state": "starting", "doing": None},
    "d": {"state": "quarantined", "doing": None},
    "e": {"state": "gone", "doing": None},
}
RECORD: dict[str, Any] = {
    "images": 30,
    "images_total": 100,
    "failed_rows": 1,
    "images_per_s": 0.5,
    "seconds_left": 140,
    "seconds_left_low": 130,
    "seconds_left_high": 155,
    "waits_for": None,
    "cards": CARDS,
    "faults": [],
}
UNKNOWN = RECORD | dict.fromkeys(("images_per_s", "seconds_left", "seconds_left_low", "seconds_left_high"))


def test_the_line_says_what_is_done_how_fast_and_how_long_it_takes() -> None:
    assert progress_line(RECORD) == (
        "30/100 images, 0.50 images/s, 2/4 cards, 1 failed row, 2 min 20 s left (2 min 10 s to 2 min 35 s)"
    )
    assert progress_line(UNKNOWN | {"images": 0, "failed_rows": 0, "waits_for": "the cluster"}) == (
        "0/100 images, - images/s, 2/4 cards, 0 failed rows, - left; waits for the cluster"
    )
    assert progress_line(RECORD | {"seconds_left_low": None}).endswith("2 min 20 s left")


def test_a_thousand_cards_are_few_lines_of_a_log() -> None:
    cards = {
        str(number): {"doing": "first batch", "phase": "first batch", "phase_s": number, "limit_s": 1800.0}
        for number in range(1000)
    }
    lines = card_lines({"cards": cards})
    assert lines[0] == "card 999: first batch"
    assert lines[-1] == f"{1000 - CARDS_SHOWN} more cards: {1000 - CARDS_SHOWN} first batch"
    assert len(lines) == CARDS_SHOWN + 1


def test_without_a_terminal_a_line_comes_at_its_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, asked = [1000.0], []

    def describe() -> dict[str, Any]:
        asked.append(now[0])
        return RECORD

    monkeypatch.setattr("gaudi_batch.reporting.terminal.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "gaudi_batch")
    with LineView() as view:
        for second in range(125):
            now[0] = 1000.0 + second
            view.show(describe)
    lines = [message for message in caplog.messages if "images/s" in message]
    assert len(lines) == 5, "at 0, 30, ... 120 s"
    assert caplog.messages.count("card a: batch") == 2, "at 60 and 120 s"
    assert len(asked) == 7, "nobody counts a thousand cards twice a second for a line in 30 s"


def test_a_log_for_machines_has_an_object_a_line_with_the_progress_in_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, log = io.StringIO(), logging.getLogger("gaudi_batch")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    monkeypatch.setattr(log, "propagate", False)  # pytest's report of a test has no lone surrogates
    monkeypatch.setenv("HF_TOKEN", "xyzzy-of-somebody")
    with LineView() as view:
        view.show(lambda: RECORD)
    log.warning("can't read %s", "s3://key:xyzzy-of-somebody@bucket\n\x1b[31m\u202e\ud800")
    try:
        raise ValueError("xyzzy-of-somebody")
    except ValueError:
        log.exception("it failed")
    text = stream.getvalue()
    assert text.isascii()
    assert all(line.isprintable() for line in text.splitlines())
    assert "xyzzy" not in text
    progress, warning, error = map(json.loads, text.splitlines())
    assert progress["message"].startswith("30/100 images")
    assert {name: progress[name] for name in ("images", "images_per_s", "cards_ready", "seconds_left_high")} == {
        "images": 30,
        "images_per_s": 0.5,
        "cards_ready": 2,
        "seconds_left_high": 155,
    }
    assert (warning["level"], warning["logger"]) == ("WARNING", "gaudi_batch")
    assert warning["message"] == "can't read s3://***@bucket\n\x1b[31m\u202e\ud800"
    assert warning["time"].endswith("Z")
    assert error["exception"].endswith("ValueError: ***")
