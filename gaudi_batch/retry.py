"""Trying again what may fail for a while: how long one try may take, what is hopeless, and when the next comes."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

T = TypeVar("T")

FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 30.0
PERMANENT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
PERMANENT_ERRORS = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ImportError,
    ValueError,
    TypeError,
)
PERMANENT_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")
PASSING_STATUSES = {408, 409, 425, 429}
PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
"""What S3 says with status 400 of a request that broke on its way."""


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


def is_permanent(error: Exception) -> bool:
    """Whether storage would say the same again: it refuses, or what was asked for can't be."""
    if type(error).__name__ in PERMANENT_NAMES:
        return True
    if isinstance(error, OSError) and error.errno in PERMANENT_ERRNOS:
        return True
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if 400 <= status < 500 and status not in PASSING_STATUSES:
            return response.get("Error", {}).get("Code") not in PASSING_CODES
    return isinstance(error, PERMANENT_ERRORS) and not isinstance(error, (TimeoutError, ConnectionError))


def delays() -> Iterator[float]:
    """Seconds between tries: exponential backoff with jitter, as a thousand cards must not come back at one instant."""
    longest = FIRST_DELAY_SECONDS
    while True:
        yield random.uniform(longest / 2, longest)
        longest = min(2 * longest, LONGEST_DELAY_SECONDS)
