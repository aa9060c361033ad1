"""What a person sees while a job runs: a view at the foot of a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, TextIO, cast

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.live import Live
from rich.logging import RichHandler

from gaudi_batch.reporting.console import LossyStream
from gaudi_batch.reporting.json_log import FIELDS, logs_json
from gaudi_batch.reporting.progress_text import Record, card_lines, progress_fields, progress_line
from gaudi_batch.reporting.view import RunView
from gaudi_batch.text import OneLineFormatter

LINE_INTERVAL_S = 30.0
"""Seconds between two plain lines about the progress."""
CARDS_INTERVAL_S = 60.0
"""Seconds between two sets of plain lines about the cards."""
REDRAW_INTERVAL_S = 1.0
"""Seconds between two pictures on a terminal."""
MAX_DRAWING_SHARE = 0.05
"""Of the driver's time, the share that drawing may take."""
FOOT_SHARE = 0.67
"""Of the terminal's lines, those that the view may take; the others are for the log."""

log = logging.getLogger("gaudi_batch")
"""The logger of the whole package, whose lines go above the view."""

Describe = Callable[[], Record]
"""Says what progress.json would say now."""


class View(Protocol):
    """Shows progress and log lines."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, describe: Describe) -> None:
        """Called several times a second."""


class LineView:
    """Plain log lines, where there is no terminal."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._cards_last = time.monotonic()

    def __enter__(self) -> LineView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, describe: Describe) -> None:
        """Logs a line every `LINE_INTERVAL_S`, and what the cards are doing every `CARDS_INTERVAL_S`."""
        now = time.monotonic()
        if self._last is None or now - self._last >= LINE_INTERVAL_S:
            self._last = now
            record = describe()
            log.info("%s", progress_line(record), extra={FIELDS: progress_fields(record)})
        if now - self._cards_last >= CARDS_INTERVAL_S:
            self._cards_last = now
            for line in card_lines(describe()):
                log.info("%s", line)


class FootView:
    """The view at the foot of a terminal, with log lines above."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._console = console
        self._opened = contextlib.ExitStack()
        self._next = time.monotonic()

    def __enter__(self) -> FootView:
        self._opened.enter_context(logs_above(self._console))
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        self._opened.close()

    def show(self, describe: Describe) -> None:
        """Draws anew every `REDRAW_INTERVAL_S`; less often where ten thousand cards make that a work of its own."""
        began = time.monotonic()
        if began >= self._next:
            self._live.update(RunView(describe(), FOOT_SHARE), refresh=True)
            ended = time.monotonic()
            self._next = ended + max(REDRAW_INTERVAL_S, (ended - began) / MAX_DRAWING_SHARE)


def open_view() -> View:
    """The view for this process's standard error. While one is drawn, the program's log lines for the terminal go above
    it; handlers that write elsewhere are left alone."""
    # A terminal may disappear while the run goes on.
    console = Console(file=cast(TextIO, LossyStream(sys.stderr)))
    if draws(sys.stderr, console):
        return FootView(console)
    return LineView()


def draws(stream: TextIO, console: Console) -> bool:
    """Whether a picture can be drawn on a stream, and log lines for machines are not written there."""
    return stream.isatty() and not console.is_dumb_terminal and not logs_json(log)


@contextlib.contextmanager
def logs_above(console: Console) -> Iterator[None]:
    """Has the log lines for the terminal go above what is drawn there."""
    before = list(log.handlers)
    replaced = [handler for handler in before if _writes_to_terminal(handler)]
    if replaced:
        log.handlers[:] = [*(handler for handler in before if handler not in replaced), _above(console, replaced[0])]
    try:
        yield
    finally:
        log.handlers[:] = before


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return bool(stream is not None and stream.isatty())


def _above(console: Console, replaced: logging.Handler) -> logging.Handler:
    handler = RichHandler(
        console=console,
        level=replaced.level,
        show_path=False,
        show_level=False,
        markup=False,
        highlighter=NullHighlighter(),
        omit_repeated_times=False,
        log_time_format="%H:%M:%S",
    )
    handler.filters = list(replaced.filters)
    handler.setFormatter(OneLineFormatter("%(message)s"))
    return handler
