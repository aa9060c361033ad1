"""What goes on beside the event loop of a driver: its tasks, and threads for what may have to wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

THREADS = 4


class Background:
    """Tasks and threads, to be used in the thread of the event loop.

    Args:
        failed: called with what a task raises; a task that is gone could leave the run waiting for ever.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.asking_ray_since: float | None = None
        """Since when Ray has been asked for something, monotonic; None while it is not."""
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        # Not the event loop's own, whose end would wait for what never comes back.
        self._threads = ThreadPoolExecutor(THREADS, "driver")
        self._ray = ThreadPoolExecutor(1, "ray")

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins a task, which ends with the run."""
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
        """Calls a function that may have to wait."""
        return await self._loop.run_in_executor(self._threads, function, *arguments)

    def ask_ray(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Has Ray asked for something, after all that it was to be asked before. All calls of Ray's control service are
        made so: one that is still going on when this process leaves Ray would end the process."""

        def call() -> T:
            self.asking_ray_since = time.monotonic()
            try:
                return function(*arguments)
            finally:
                self.asking_ray_since = None

        return self._loop.run_in_executor(self._ray, call)

    def tell_ray(self, function: Callable[..., None], *arguments: Any) -> None:
        """The same for what gives no answer that anybody waits for."""

        async def wait() -> None:
            await answer

        answer = self.ask_ray(function, *arguments)
        self.spawn(wait())

    def cancel(self) -> None:
        """Ends all tasks that end with the run."""
        for task in self._tasks:
            task.cancel()

    async def close_ray(self, function: Callable[[], None], timeout: float) -> None:
        """Has Ray asked for one last thing.

        Args:
            function: asks for it.
            timeout: seconds that it is waited for.
        """
        closed = asyncio.wrap_future(self._ray.submit(function))
        self._ray.shutdown(wait=False)
        await asyncio.wait([closed], timeout=timeout)

    def shut_down(self) -> None:
        """Ends the threads, without a wait for those that are still at something."""
        self._threads.shutdown(wait=False)
