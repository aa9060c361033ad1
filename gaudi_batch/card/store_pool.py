"""The threads that encode and store images beside the device's work.

They share the interpreter with the pipeline's own Python, which waits for it each time that one of them has it. So as
few of them work as keep up with the device.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

NEWEST_SHARE = 0.3
"""Weight of the newest task in the mean of what tasks take."""


class StorePool:
    """Runs tasks in the order in which they come, in as many threads as they need.

    Args:
        threads: that work at the same time, at most; 1 or more.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "store")
        self._threads = self._width = threads
        self._lock = threading.Lock()
        self._tasks: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._working = 0
        self._task_s: float | None = None
        self._needed: tuple[int, float] = (threads, 0.0)

    @property
    def width(self) -> int:
        """How many threads may work now."""
        return self._width

    def submit(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """Runs a task as soon as a thread may."""
        future: Future[T] = Future()
        with self._lock:
            self._tasks.append((future, task, arguments))
            self._start_threads()
        return future

    def keep_up(self, tasks: int, seconds: float) -> None:
        """Has as few threads work as are done with so many tasks in so many seconds."""
        with self._lock:
            self._needed = tasks, seconds
            self._fit()

    def widen(self) -> None:
        """Has all threads work until `keep_up` says otherwise: somebody waits for the tasks."""
        with self._lock:
            self._needed = self._threads, 0.0
            self._width = self._threads
            self._start_threads()

    def _fit(self) -> None:
        tasks, seconds = self._needed
        if self._task_s is not None and seconds > 0:
            self._width = min(self._threads, max(1, math.ceil(tasks * self._task_s / seconds)))
        self._start_threads()

    def _start_threads(self) -> None:
        for _ in range(min(self._width - self._working, len(self._tasks))):
            self._working += 1
            self._pool.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._tasks or self._working > self._width:
                    self._working -= 1
                    return
                future, task, arguments = self._tasks.popleft()
            started = time.monotonic()
            try:
                result = task(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, task, arguments  # the pixels of an image that is stored are not kept
            took = time.monotonic() - started
            with self._lock:
                before = took if self._task_s is None else self._task_s
                self._task_s = before + NEWEST_SHARE * (took - before)
                self._fit()
