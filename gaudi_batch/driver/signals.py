"""How a driver's event loop runs, and how signals, requests in the output and notebooks end it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gaudi_batch.driver.stop_watch import watched_for_stop
from gaudi_batch.storage.store import Storage

if TYPE_CHECKING:
    from gaudi_batch.driver.loop import Driver

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "interrupted"
"""Why a run stopped that a person ended."""


@contextlib.contextmanager
def handlers_kept() -> Iterator[Callable[[], None]]:
    """Restores the handlers of signals at the end, and when the yielded function is called: Ray replaces them when it
    starts, and an event loop resets them when it ends."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if in_main}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()


class LoopRunner:
    """Runs a driver to its end.

    Args:
        make_driver: makes the driver, in the event loop that it is to run in.
        grace: seconds that what has begun may take to be committed.
        storage: the output, in which a request to stop may lie.
    """

    def __init__(self, make_driver: Callable[[], Driver], grace: float, storage: Storage) -> None:
        self._make_driver = make_driver
        self._grace = grace
        self._storage = storage
        self._driver: Driver | None = None
        self._begun = threading.Event()

    def run(self) -> tuple[Driver, str | None]:
        """Runs the driver; returns it and why it stopped. Works where an event loop is running already, too, as in a
        notebook."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._until_over())
        with ThreadPoolExecutor(1, "driver") as pool:
            over = pool.submit(asyncio.run, self._until_over())
            try:
                return over.result()
            except KeyboardInterrupt:
                self._from_here(lambda driver: driver.stop(INTERRUPTED, self._grace))
            try:
                return over.result()
            except KeyboardInterrupt:
                self._from_here(lambda driver: driver.stop_at_once(INTERRUPTED))
                return over.result()

    async def _until_over(self) -> tuple[Driver, str | None]:
        """The first signal stops the driver gently, the second at once; a request in the output stops it with the grace
        that it names."""
        try:
            self._driver = driver = self._make_driver()
        finally:
            self._begun.set()
        signals = 0

        def interrupted(number: int) -> None:
            nonlocal signals
            signals += 1
            name = signal.Signals(number).name
            if signals == 1:
                log.warning("%s: finishing what has begun, for up to %g s; once more stops at once", name, self._grace)
                driver.stop(INTERRUPTED, self._grace)
            else:
                driver.stop_at_once(INTERRUPTED)

        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                driver.loop.add_signal_handler(number, interrupted, number)

        def stop_requested(seconds: float) -> None:
            log.warning("asked to stop: finishing what has begun, for up to %g s", seconds)
            driver.loop.call_soon_threadsafe(driver.stop, INTERRUPTED, seconds)

        with watched_for_stop(self._storage, stop_requested):
            return driver, await driver.run()

    def _from_here(self, act: Callable[[Driver], None]) -> None:
        self._begun.wait()
        if self._driver is not None:
            self._driver.loop.call_soon_threadsafe(act, self._driver)
