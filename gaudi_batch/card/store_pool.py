"""The threads that encode and store images beside the device's work.

They share the interpreter with the pipeline's own Python, which waits for it each time that one of them has it. So as
few of them work as have stored a batch's images before the next batch is made.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class StorePool:
    """Runs tasks in the order in which they come, in as many threads as they need.

    Args:
        threads: that work at the same time, at most; 1 or more. All do until it is known that fewer keep up.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "store")
        self._threads = self._limit = threads
        self._all_work = False
        self._lock = threading.Lock()
        self._tasks: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._working = 0

    @property
    def limit(self) -> int:
        """How many threads may work now."""
        return self._threads if self._all_work else self._limit

    def submit(self, task: Callable[..., T], *arguments: Any) -> Future[T]:
        """Runs a task as soon as a thread may."""
        future: Future[T] = Future()
        with self._lock:
            self._tasks.append((future, task, arguments))
            self._start_threads()
        return future

    def adjust(self) -> None:
        """Before the tasks of a batch: one thread fewer may work if all earlier tasks are done, and one more if some
        still wait for a thread."""
        with self._lock:
            self._all_work = False
            if self._tasks:
                self._limit = min(self._threads, self._limit + 1)
            elif not self._working:
                self._limit = max(1, self._limit - 1)
            self._start_threads()

    def widen(self) -> None:
        """All threads may work: the device waits for the tasks."""
        with self._lock:
            self._limit = self._threads
            self._start_threads()

    def let_all_work(self) -> None:
        """All threads may work until the next batch: the pipeline does not need the interpreter."""
        with self._lock:
            self._all_work = True
            self._start_threads()

    def _start_threads(self) -> None:
        for _ in range(min(self.limit - self._working, len(self._tasks))):
            self._working += 1
            self._pool.submit(self._work)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._tasks or self._working > self.limit:
                    self._working -= 1
                    return
                future, task, arguments = self._tasks.popleft()
            try:
                result = task(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, task, arguments  # the pixels of an image that is stored are not kept
