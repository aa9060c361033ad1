"""A filesystem whose operations are tried again while they fail.

What a store itself calls impossible (no permission, no such bucket, a full disk) is raised at once; all else that goes
wrong is tried again with backoff and jitter, for as long as `storage_patience`. So is a bucket that is not there,
or credentials that are not, once they have been. A try that does not come back is given up and counts as one that
failed, so nothing waits for storage longer than that and one more try.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gaudi_batch.errors import StorageError
from gaudi_batch.redaction import learn, redact
from gaudi_batch.storage.filesystem import lacks_credentials, search_credentials_again, subdue
from gaudi_batch.storage.retry import CREDENTIALS_TIMEOUT_S, bucket_is_gone, delays, is_permanent, run_with_timeout

T = TypeVar("T")

log = logging.getLogger(__name__)

TRY_TIMEOUT_S = 60.0
"""Seconds of one try at reading or writing an object, beside those that its bytes need."""
MANY_TIMEOUT_S = 600.0
"""Seconds of one try at an operation of many requests, such as a listing."""
FIRST_WARNING_S = 10.0
"""Seconds of trying before the first warning; the next comes after twice as long."""
END_TIMEOUT_S = 10.0
"""Seconds for which a run that stops tries to record how it ended; storage may be why it stops."""


class Retrying:
    """A filesystem that repeats operations which fail, for as long as `retry_timeout_s`.

    Args:
        filesystem: of fsspec.
        url: what messages call it.
        options: its options, which may be secrets.
        retry_timeout_s: seconds for which a failing operation is tried again.
    """

    def __init__(self, filesystem: Any, url: str, options: Mapping[str, Any], retry_timeout_s: float) -> None:
        self.filesystem = filesystem
        self.url = url
        self.options = dict(options)
        self.retry_timeout_s = retry_timeout_s
        self.try_timeout_s = TRY_TIMEOUT_S
        self.last_error = ""
        """The error of the last try that failed, for code that waits."""
        self._known = False  # whether the bucket and the credentials were there before
        self._running: dict[object, float] = {}
        self._lock = threading.Lock()
        subdue(filesystem)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_running")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        learn(self.options)
        subdue(self.filesystem)
        self._running, self._lock = {}, threading.Lock()

    def longest_running_s(self) -> float:
        """Seconds for which the oldest operation under way has been going on; 0 if there is none."""
        with self._lock:
            return time.monotonic() - min(self._running.values()) if self._running else 0.0

    def shut_down(self, timeout: float = END_TIMEOUT_S) -> None:
        """Limits all operations, including those under way, to the time that a stopping run has.

        Args:
            timeout: seconds that they may be tried; at 0 nothing is tried again.
        """
        self.retry_timeout_s = min(self.retry_timeout_s, timeout)
        if timeout:
            self.try_timeout_s = min(self.try_timeout_s, timeout)

    def with_retries(
        self,
        what: str,
        operation: Callable[[], T],
        seconds: float = TRY_TIMEOUT_S,
        before: Callable[[], None] = lambda: None,
    ) -> T:
        """Runs an operation until it succeeds, storage refuses it, or `retry_timeout_s` is over.

        Args:
            what: the operation, as one says "can't ...".
            operation: does it.
            seconds: how long one try may take. One on a filesystem that is asynchronous has timeouts of its own; any
                other is left behind in its thread.
            before: called before each try; what it raises is raised.

        Raises:
            StorageError: with the storage's own words, secrets taken out.
        """
        started, next_warning = time.monotonic(), FIRST_WARNING_S
        without_credentials = False
        operation_id = object()
        with self._lock:
            self._running[operation_id] = started
        try:
            for delay in delays():
                before()
                try:
                    if without_credentials:
                        search_credentials_again(self.filesystem)
                        without_credentials = False
                    return operation() if self.filesystem.async_impl else run_with_timeout(operation, seconds)
                except Exception as error:
                    waited = time.monotonic() - started
                    reason = redact(" ".join(f"{type(error).__name__}: {error}".split()), self.options)
                    self.last_error = f": {reason[:200]}"
                    retry_timeout_s, limit = self.retry_timeout_s, " (storage_patience)"
                    if self._known and lacks_credentials(self.filesystem, error):
                        retry_timeout_s, limit = min(retry_timeout_s, CREDENTIALS_TIMEOUT_S), ""
                        without_credentials = True
                    elif is_permanent(error) and not (self._known and bucket_is_gone(error)):
                        raise StorageError(f"{self.url}: can't {what}: {reason}", refused=True) from None
                    if waited + delay > retry_timeout_s:
                        raise StorageError(
                            f"{self.url}: can't {what}, tried for {waited:.0f} s{limit}: {reason}"
                        ) from None
                    if waited < next_warning:
                        log.debug("%s: can't %s, trying again in %.1f s: %s", self.url, what, delay, reason)
                    else:
                        next_warning = 2 * waited
                        so_far = f"tried for {waited:.0f} s of {retry_timeout_s:.0f} s{limit}"
                        log.warning("%s: can't %s, %s: %s", self.url, what, so_far, reason)
                    time.sleep(delay)
        finally:
            with self._lock:
                del self._running[operation_id]
        raise AssertionError("the delays never end")
