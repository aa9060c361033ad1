"""Asks Hugging Face's hub, and uploads to it, until it answers or refuses."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.export.export import RETRY_TIMEOUT_S
from gaudi_batch.storage.retry import PERMANENT_ERRNOS, delays
from gaudi_batch.text import one_line

T = TypeVar("T")
log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 120.0
"""Seconds for which the hub, or a store behind it, may keep a connection waiting: for an answer, or until it takes more
of a file. A slow upload that goes on is not cut off."""
WAIT_S = 0.2
"""Seconds between two looks at an upload."""
LAST_ERROR_S = 60.0
"""Seconds after which an error says nothing any more of an upload that goes on."""
READ_INTERVAL_FACTOR = 30
"""How far an upload has come is read again after so many times the time that reading it took."""
_PASSING = (408, 409, 412, 425, 429)
"""Statuses of errors that pass."""
_REFUSED = re.compile(r"\b4(?!08|09|12|25|29)\d\d (Client Error|[A-Z])|Invalid metadata")
"""Errors that stay."""
_IS_MADE_AGAIN = " thrown while requesting "
"""In the warnings of requests that huggingface_hub makes again by itself, before it says that something failed."""
_ERRNO = re.compile(r"\[Errno (\d+)\]")


def set_timeouts() -> None:
    """Has huggingface_hub take a request that gets no answer for one that failed: of itself it waits for ever."""
    import requests
    from huggingface_hub import configure_http_backend, get_session

    class Session(requests.Session):
        def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
            options["timeout"] = options.get("timeout") or ANSWER_TIMEOUT_S
            return super().send(request, **options)

    adapters = {prefix: type(adapter) for prefix, adapter in get_session().adapters.items()}

    def session() -> Session:
        made = Session()
        for prefix, adapter in adapters.items():
            made.mount(prefix, adapter())
        return made

    configure_http_backend(session)


def from_hub(repository: str, ask: Callable[[], T], came_further: Callable[[], bool] = lambda: False) -> T:
    """What the hub answers; tried again while it does not answer or says that it can't, for RETRY_TIMEOUT_S after the
    first time.

    Args:
        repository: that is asked for.
        ask: asks once.
        came_further: called each time that it fails: whether it has come further since the last time. The time then
            begins anew.

    Raises:
        InputError: it refuses.
        StorageError: it went on failing, or this disk refuses.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    failing_since: float | None = None
    for delay in delays():
        try:
            return ask()
        except (OSError, ValueError) as raised:  # those of requests and huggingface_hub among them
            error = _origin(raised)
            told = one_line(error, 300)
            if _is_refusal(error):
                raise InputError(f"--push {repository!r}: the hub refuses: {told}; is HF_TOKEN set?") from None
            if isinstance(error, OSError) and error.errno in PERMANENT_ERRNOS:
                raise _disk_refuses(repository, told) from None
            now = time.monotonic()
            if came_further() or failing_since is None:
                failing_since = now
            if now - failing_since + delay > RETRY_TIMEOUT_S or isinstance(error, OfflineModeIsEnabled):
                raise StorageError(f"--push {repository!r}: the hub can't be reached: {told}") from None
            log.warning("%s: the hub can't be reached, trying again: %s", repository, one_line(error, 200))
            time.sleep(delay)
    raise AssertionError("the delays never end")


def _origin(error: BaseException) -> BaseException:
    """The error of the request itself, where huggingface_hub raised another from it."""
    cause = error.__cause__
    is_of_request = getattr(error, "response", None) is not None
    return cause if isinstance(cause, (OSError, ValueError)) and not is_of_request else error


def _is_refusal(error: BaseException) -> bool:
    """Whether the hub, or huggingface_hub before it asks, would refuse the same again."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, ValueError) and not isinstance(error, LocalEntryNotFoundError):
        return not isinstance(error, json.JSONDecodeError)  # a gateway's page in place of an answer
    return _status(error) < 500 and _status(error) not in _PASSING


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", None) or 500)


def _disk_refuses(repository: str, told: str) -> StorageError:
    return StorageError(f"--push {repository!r}: {told}; make room or set TMPDIR and HF_HOME", refused=True)


def upload_until_done(upload: Callable[[], None], repository: str, cache: Path) -> None:
    """Uploads until all is there.

    Args:
        upload: does it; goes on where it was when it is called again.
        repository: where to.
        cache: where huggingface_hub notes how far it has come.

    Raises:
        InputError: the hub refuses.
        StorageError: it has failed for RETRY_TIMEOUT_S without any progress, or this disk refuses.
    """
    progress = Progress(cache)
    from_hub(
        repository,
        lambda: _upload(upload, repository, Progress(cache)),
        came_further=lambda: progress.was_made(at_once=True),
    )


class _Errors(logging.Handler):
    """Keeps what huggingface_hub logs of an upload that fails: it tries again for ever."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        self.told = ""
        """The last with the error that it came of."""
        self.since: float | None = None
        """When the first was logged since `forget`, or the first request was made again."""
        self.latest = 0.0
        """When the last was."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        message, now = record.getMessage(), time.monotonic()
        has_failed = record.levelno >= logging.ERROR and message.startswith("Failed")
        if has_failed:
            self.last, self.told, self.latest = message, _with_cause(message, sys.exc_info()[1]), now
        if has_failed or _IS_MADE_AGAIN in message:
            self.since = self.since or now

    def forget(self) -> None:
        """The upload goes on."""
        self.since = None


def _with_cause(message: str, error: BaseException | None) -> str:
    """What huggingface_hub logs of an error that it handles, with the status and the words of a store."""
    origin = error and _origin(error)
    if origin is None or origin is error:
        return message
    words = getattr(origin, "server_message", None)
    return f"{message.rstrip('.')}: {f'{_status(origin)} {words}' if words else origin}"


class Progress:
    """How far an upload has come, by a file that huggingface_hub writes for each file of it.

    Args:
        cache: the directory of these.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._noted: set[tuple[str, int]] | None = None
        self._read_next_at = 0.0

    def was_made(self, *, at_once: bool) -> bool:
        """Whether it has come further since it was looked at last.

        Args:
            at_once: looks whatever a look takes. Otherwise there are few looks where each takes long.
        """
        began = time.monotonic()
        if began < self._read_next_at and not at_once:
            return False
        before, self._noted = self._noted, _noted(self._cache)
        ended = time.monotonic()
        self._read_next_at = ended + READ_INTERVAL_FACTOR * (ended - began)
        return before is not None and before != self._noted


def _noted(cache: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in cache.rglob("*.metadata")}


def _upload(upload: Callable[[], None], repository: str, progress: Progress) -> None:
    """Runs an upload until it has ended, has failed for RETRY_TIMEOUT_S without any progress, or is refused; raises
    what it raises."""
    errors, ended = _Errors(), []
    logger = logging.getLogger("huggingface_hub")
    thread = threading.Thread(target=lambda: ended.append(_outcome(upload)), name="push", daemon=True)
    logger.addHandler(errors)
    try:
        thread.start()
        while not ended:
            thread.join(WAIT_S)
            if errors.since is None:
                continue
            told = one_line(errors.told, 300)
            if _REFUSED.search(errors.last):
                raise InputError(f"--push {repository!r}: the hub refuses: {told}")
            if (number := _ERRNO.search(errors.last)) and int(number[1]) in PERMANENT_ERRNOS:
                raise _disk_refuses(repository, told)
            now = time.monotonic()
            is_over = now - errors.since > RETRY_TIMEOUT_S and now - errors.latest < LAST_ERROR_S
            if progress.was_made(at_once=is_over):
                errors.forget()
            elif is_over:
                raise StorageError(
                    f"--push {repository!r}: tried for {RETRY_TIMEOUT_S:.0f} s: {told}; the same command goes on"
                )
    finally:
        logger.removeHandler(errors)
    if ended[0] is not None:
        raise ended[0]


def _outcome(upload: Callable[[], None]) -> Exception | None:
    try:
        upload()
    except Exception as error:
        return error
    return None
