"""The tasks of a driver's event loop, and its threads for calls that may block."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

THREADS = 4


class Background:
    """Tasks and threads. All methods are called in the event loop's thread.

    Args:
        failed: called with the exception that ended a task; the run could otherwise wait for that task for ever.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.asking_ray_since: float | None = None
        """Since when a call of Ray has been going on, monotonic; None while there is none."""
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        # Not the event loop's own pool: closing the loop would wait for calls that never return.
        self._threads = ThreadPoolExecutor(THREADS, "driver")
        self._ray = ThreadPoolExecutor(1, "ray")

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins a task that ends with the run."""
        task = self.guarded(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def guarded(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins a task that goes on when the run ends."""

        async def guard() -> None:
            try:
                await work
            except Exception as error:
                self._failed(error)

        task = self._loop.create_task(guard())
        task.add_done_callback(lambda _: work.close())  # a task that is cancelled at once never begins it
        return task

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function that may block, in a thread."""
        return await self._loop.run_in_executor(self._threads, function, *arguments)

    def ask_ray(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Calls a function that asks Ray, in the one thread for such calls, one after the other. All calls of Ray's
        control service are made so: a call that is still going on when this process disconnects from Ray ends the
        process."""

        def call() -> T:
            self.asking_ray_since = time.monotonic()
            try:
                return function(*arguments)
            finally:
                self.asking_ray_since = None

        return self._loop.run_in_executor(self._ray, call)

    def tell_ray(self, function: Callable[..., None], *arguments: Any) -> None:
        """The same for a call whose answer nobody needs."""

        async def wait() -> None:
            await answer

        answer = self.ask_ray(function, *arguments)
        self.spawn(wait())

    def cancel(self) -> None:
        """Ends all tasks that end with the run."""
        for task in self._tasks:
            task.cancel()

    async def close_ray(self, function: Callable[[], None], timeout: float) -> None:
        """Makes the last call of Ray.

        Args:
            function: makes it.
            timeout: seconds to wait for it.
        """
        closed = asyncio.wrap_future(self._ray.submit(function))
        self._ray.shutdown(wait=False)
        await asyncio.wait([closed], timeout=timeout)

    def shut_down(self) -> None:
        """Ends the threads without waiting for calls that are still going on."""
        self._threads.shutdown(wait=False)
