"""What a retry needs to know: how long one try may take, which errors are permanent, and when the next try comes."""

from __future__ import annotations

import asyncio
import errno
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

T = TypeVar("T")

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
KEEP_INTERVAL_S = 0.25
"""Seconds between two questions whether an operation under way may go on."""
CREDENTIALS_TIMEOUT_S = 60.0
"""Seconds for which credentials that were there before are asked for again: a service that gives out those of a role
answers again within seconds, and a node that has lost its role has to say so long before `storage_patience` is over."""
PERMANENT_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSYS,  # what s3fs makes of status 501
}
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
PERMANENT_NAMES = ("PartialCredentialsError", "ParamValidationError", "OfflineModeIsEnabled")
"""Names of errors of botocore, and of huggingface_hub where HF_HUB_OFFLINE is set."""
NO_CREDENTIALS_NAMES = ("NoCredentialsError", "CredentialUnavailableError", "ClientAuthenticationError")
"""Names of botocore's and Azure's errors for missing credentials; the last one counts if no answer came with it."""
GONE_CODES = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"}
TRANSIENT_STATUSES = {408, 409, 425, 429}
TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}
"""S3's codes, with status 400, for a request that broke on its way."""


class BucketGone(FileNotFoundError):
    """Not the object is missing but its bucket."""


def begin(operation: Callable[[], T]) -> Future[T]:
    """Begins an operation in a thread of its own, which may be left behind: nothing can end an operation that a disk
    blocks, and a thread of a pool would keep the process alive."""
    ended: Future[T] = Future()

    def target() -> None:
        try:
            ended.set_result(operation())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return ended


def run_with_timeout(operation: Callable[[], T], seconds: float) -> T:
    """Runs an operation, and leaves it behind if it does not end.

    Raises:
        TimeoutError: it has not ended.
    """
    ended = begin(operation)
    try:
        return ended.result(seconds)
    except FutureTimeout:
        if ended.done():
            raise
        raise TimeoutError(f"no answer for {seconds:.0f} s") from None


def run_or_cancel(
    coroutine: Coroutine[Any, Any, T],
    loop: asyncio.AbstractEventLoop,
    seconds: float,
    keep: Callable[[], bool] = lambda: True,
) -> T:
    """Runs a coroutine in a loop of another thread and cancels it if it does not end.

    Args:
        coroutine: what to run.
        loop: of the other thread.
        seconds: how long it may take.
        keep: asked before it begins and every `KEEP_INTERVAL_S`; once it says no, it has taken too long.

    Raises:
        TimeoutError: it has not ended.
    """
    if not keep():
        coroutine.close()
        raise TimeoutError("it came too late to begin")
    running = asyncio.run_coroutine_threadsafe(coroutine, loop)
    started = time.monotonic()
    try:
        while True:
            try:
                return running.result(min(KEEP_INTERVAL_S, seconds))
            except FutureTimeout:
                waited = time.monotonic() - started
                if running.done():
                    raise
                if waited >= seconds or not keep():
                    raise TimeoutError(f"no answer for {waited:.0f} s") from None
    finally:
        running.cancel()


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of a store's library; None if there is none."""
    for cause in (error, error.__cause__):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if isinstance(status := getattr(cause, "status_code", None), int):  # azure-core's
            return status
    if type(error).__name__ == "HttpError" and isinstance(code := getattr(error, "code", None), int):  # gcsfs'
        return code
    return 403 if str(error).startswith("Forbidden: ") else None  # gcsfs', too, an OSError without a number


def code_of(error: BaseException) -> str | None:
    """The store's own name of an error; None if its library does not tell."""
    for cause in (error, error.__cause__):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        if isinstance(code := getattr(cause, "error_code", None), str):  # azure-core's
            return str(getattr(code, "value", code))
    return None


def bucket_is_gone(error: BaseException) -> bool:
    """Whether a store says that the bucket is missing, and not just the object."""
    return isinstance(error, BucketGone) or code_of(error) in GONE_CODES


def no_credentials(error: BaseException) -> bool:
    """Whether there are no credentials for the store."""
    return type(error).__name__ in NO_CREDENTIALS_NAMES and status_of(error) is None


def is_permanent(error: Exception) -> bool:
    """Whether another try would fail the same way: the store refuses, or what was asked for is impossible."""
    if type(error).__name__ in PERMANENT_NAMES or no_credentials(error):
        return True
    if isinstance(error, OSError) and error.errno in PERMANENT_ERRNOS:
        return True
    status = status_of(error)
    if status is not None and 400 <= status < 500 and status not in TRANSIENT_STATUSES:
        return code_of(error) not in TRANSIENT_CODES
    return isinstance(error, PERMANENT_ERRORS) and not isinstance(error, (TimeoutError, ConnectionError))


def delays() -> Iterator[float]:
    """Seconds between tries: exponential backoff with jitter, so that a thousand cards do not come back at one
    instant."""
    longest = FIRST_DELAY_S
    while True:
        yield random.uniform(longest / 2, longest)
        longest = min(2 * longest, MAX_DELAY_S)
