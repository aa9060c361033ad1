"""A limit for calls that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

T = TypeVar("T")


def in_time(operation: Callable[[], T], seconds: float) -> T:
    """Runs an operation in a thread that is left behind if it does not end: nothing can end one that a disk holds, and
    one of a pool would keep the process.

    Raises:
        TimeoutError: it has not ended.
    """
    ended: Future[T] = Future()

    def target() -> None:
        try:
            ended.set_result(operation())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    try:
        return ended.result(seconds)
    except FutureTimeout:
        if ended.done():
            raise
        raise TimeoutError(f"no answer for {seconds:.0f} s") from None
