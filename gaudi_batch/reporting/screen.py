"""Where `status --watch` shows what it sees: drawn on a terminal, in lines elsewhere, as JSON for machines."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from rich.console import Console
from rich.live import Live

from gaudi_batch.reporting.console import LossyStream, OutputLost, say
from gaudi_batch.reporting.terminal import LINE_INTERVAL_S, draws, logs_above
from gaudi_batch.reporting.view import RunView
from gaudi_batch.reporting.watch import Seen

ASK_INTERVAL_S = 5.0
"""Seconds between two looks: as often as the driver writes progress.json."""


@contextlib.contextmanager
def open_screen(as_json: bool) -> Iterator[tuple[Callable[[Seen], None], float]]:
    """Yields a function that shows what was seen, and the seconds between two looks that suit it. The function raises
    OutputLost.

    Args:
        as_json: whether a program reads it.
    """
    console = Console(file=cast(TextIO, LossyStream(sys.stdout)))
    if as_json:
        yield _each_once(lambda seen: say(seen.json())), ASK_INTERVAL_S
    elif not draws(sys.stdout, console):
        yield _each_once(lambda seen: say(f"{time.strftime('%H:%M:%S')} {seen.line()}")), LINE_INTERVAL_S
    else:
        with logs_above(console), Live(console=console, auto_refresh=False, transient=True) as live:
            yield lambda seen: _draw(live, seen), ASK_INTERVAL_S


def _each_once(tell: Callable[[Seen], None]) -> Callable[[Seen], None]:
    told: Seen | None = None

    def show(seen: Seen) -> None:
        nonlocal told
        if seen is not told:
            told = seen
            tell(seen)

    return show


def _draw(live: Live, seen: Seen) -> None:
    if not sys.stdout.isatty():  # the terminal is gone
        raise OutputLost(OSError(errno.EIO, os.strerror(errno.EIO)))
    as_of = f", as of {seen.record['time']}" if seen.record["time"] else ""
    live.update(RunView(seen.record, 1.0, f"{seen.output}: {seen.state}{as_of}", seen.notes), refresh=True)
