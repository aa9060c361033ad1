"""What a person sees while a job runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TextIO, cast

from rich.console import Console, Group
from rich.highlighter import NullHighlighter
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gaudi_batch.output.cost import cost_words
from gaudi_batch.reporting.console import LossyStream
from gaudi_batch.text import OneLineFormatter, counted, duration

PROGRESS_LINE_INTERVAL_S = 10.0
"""Seconds between two plain lines about the progress."""
CARDS_INTERVAL_S = 60.0
"""Seconds between two sets of plain lines about the cards."""

log = logging.getLogger("gaudi_batch")
"""The logger of the whole package, whose lines go above the bar."""


@dataclass(frozen=True)
class Progress:
    """The progress of a run."""

    images: int
    images_total: int
    failed_rows: int
    cards_ready: int
    cards: int
    images_per_s: float | None
    """Over the last minute; None until it is known."""
    waits_for: str | None = None
    """What the run as a whole waits for; None if it does not wait."""
    cards_doing: tuple[str, ...] = ()
    """Lines about what cards are doing; few, however many cards there are."""
    cost: float | None = None
    """So far; None if it is not known."""
    cost_expected: float | None = None

    @property
    def seconds_left(self) -> float | None:
        """Seconds left; None until they are known."""
        if not self.images_per_s:
            return None
        return max(0, self.images_total - self.images) / self.images_per_s

    def line(self) -> str:
        """The progress in one line."""
        rate = "-" if self.images_per_s is None else f"{self.images_per_s:.2f}"
        cost = f", {words}" if (words := cost_words(self.cost, self.cost_expected)) else ""
        waits = "" if self.waits_for is None else f"; waits for {self.waits_for}"
        return (
            f"{self.images}/{self.images_total} images, {rate} images/s, {self.cards_ready}/{self.cards} cards,"
            f" {counted(self.failed_rows, 'failed row')}, {duration(self.seconds_left)} left{cost}{waits}"
        )


class View(Protocol):
    """Shows progress and log lines."""

    def __enter__(self) -> View: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, progress: Progress) -> None:
        """Called several times a second."""


class LineView:
    """Plain log lines, where there is no terminal."""

    def __init__(self) -> None:
        self._last = 0.0
        self._cards_last = time.monotonic()

    def __enter__(self) -> LineView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, progress: Progress) -> None:
        """Logs a line every `PROGRESS_LINE_INTERVAL_S`, and what the cards are doing every `CARDS_INTERVAL_S`."""
        now = time.monotonic()
        if now - self._last >= PROGRESS_LINE_INTERVAL_S:
            self._last = now
            log.info("%s", progress.line())
        if now - self._cards_last >= CARDS_INTERVAL_S:
            self._cards_last = now
            for line in progress.cards_doing:
                log.info("%s", line)


class BarView:
    """A bar at the foot of a terminal and what the cards are doing, with log lines above."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._console = console
        self._handlers: list[logging.Handler] = []

    def __enter__(self) -> BarView:
        self._handlers = list(log.handlers)
        others = [handler for handler in self._handlers if not _writes_to_terminal(handler)]
        if len(others) < len(self._handlers):
            log.handlers[:] = [*others, _beside_bar(self._console)]
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        log.handlers[:] = self._handlers

    def show(self, progress: Progress) -> None:
        """Redraws the bar."""
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            ProgressBar(total=max(1, progress.images_total), completed=progress.images, width=30),
            Text(progress.line()),
        )
        self._live.update(Group(grid, *map(Text, progress.cards_doing)))


def open_view() -> View:
    """The view for this process's standard error. While a bar is shown, the program's log lines for the terminal go
    above it; handlers that write elsewhere are left alone."""
    # A terminal may disappear while the run goes on.
    console = Console(file=cast(TextIO, LossyStream(sys.stderr)))
    if sys.stderr.isatty() and not console.is_dumb_terminal:
        return BarView(console)
    return LineView()


def _writes_to_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", None)
    return bool(stream is not None and stream.isatty())


def _beside_bar(console: Console) -> logging.Handler:
    handler = RichHandler(
        console=console,
        show_path=False,
        show_level=False,
        markup=False,
        highlighter=NullHighlighter(),
        omit_repeated_times=False,
        log_time_format="%H:%M:%S",
    )
    handler.setFormatter(OneLineFormatter("%(message)s"))
    return handler
