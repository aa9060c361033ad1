"""What is shown while a run goes on: a line now and then, or a bar, and log lines where they belong."""

from __future__ import annotations

import logging

import pytest

from gaudi_batch.reporting.terminal import LineView, Progress

PROGRESS = Progress(30, 100, 1, 2, 4, 0.5, None, ("card a: batch",))


def test_the_line_says_what_is_done_how_fast_and_how_long_it_takes() -> None:
    assert PROGRESS.line() == "30/100 images, 0.50 images/s, 2/4 cards, 1 failed row, 2 min 20 s left"
    unknown = Progress(0, 100, 0, 0, 4, None, "the cluster", ())
    assert unknown.seconds_left is None
    assert unknown.line() == "0/100 images, - images/s, 0/4 cards, 0 failed rows, - left; waits for the cluster"


def test_more_images_than_planned_leave_no_time() -> None:
    assert Progress(101, 100, 0, 1, 1, 1.0, None).seconds_left == 0


def test_without_a_terminal_a_line_comes_at_its_interval(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr("gaudi_batch.reporting.terminal.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "gaudi_batch")
    with LineView() as view:
        for second in range(125):
            now[0] = 1000.0 + second
            view.show(PROGRESS)
    lines = [message for message in caplog.messages if "images/s" in message]
    assert len(lines) == 13, "at 0, 10, ... 120 s"
    assert caplog.messages.count("card a: batch") == 2, "at 60 and 120 s"
