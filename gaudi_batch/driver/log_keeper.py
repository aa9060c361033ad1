"""Keeps what a driver logs, and stores it in the output.

Lines are kept from the start of a run, and stored once the run has its lease. An application that has set up no log
has this package's logger at WARNING, and no line below that is made. While a run goes on lines of INFO are, and the
application's own handlers get what they got before.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Iterator

from gaudi_batch.errors import ForcedInterrupt, GaudiBatchError, StorageError
from gaudi_batch.output.driver_log import DriverLog
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import OneLineFormatter, printable

log = logging.getLogger(__name__)
package_log = logging.getLogger("gaudi_batch")

FIRST_WRITE_S = 10.0
"""Seconds after which the log is stored for the first time."""
WRITE_INTERVAL_S = 60.0
"""Seconds between two writings of the log."""
WRITE_TIMEOUT_S = 10.0
"""Seconds that one writing may take; the lines of one that fails come with the next."""
FORCED_TIMEOUT_S = 2.0
"""The same where a run is ended at once."""


class LogKeeper(logging.Handler):
    """Keeps the log lines of a run.

    Args:
        storage: the output.
        lease: the driver's.
    """

    def __init__(self, storage: Storage, lease: LeaseKeeper) -> None:
        super().__init__()
        formatter = OneLineFormatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self._storage, self._lease = storage, lease
        self._lines = DriverLog(lease.driver)
        self._writing = threading.Lock()
        self._failing = False

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            self._keep(record)
        except Exception:
            self.handleError(record)
        _listeners.pass_on(self, record)

    @contextlib.contextmanager
    def listening(self) -> Iterator[LogKeeper]:
        """Keeps lines meanwhile."""
        _listeners.add(self)
        try:
            yield self
        finally:
            _listeners.remove(self)

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Stores the lines meanwhile and at the end, with the error that ends it. To be entered once the lease is
        taken, and left before it is given back."""
        over = threading.Event()
        threading.Thread(target=self._store_now_and_then, args=(over,), name="log", daemon=True).start()
        timeout_s = WRITE_TIMEOUT_S
        try:
            yield
        except BaseException as error:
            self._note_error(error)
            timeout_s = FORCED_TIMEOUT_S if isinstance(error, ForcedInterrupt) else WRITE_TIMEOUT_S
            raise
        finally:
            over.set()
            self._store(timeout_s)

    def note(self, message: str, level: int = logging.INFO) -> None:
        """Adds a line that only the stored log has: what the command prints, or logs when the run is over."""
        self._keep(logging.LogRecord(package_log.name, level, "", 0, message, None, None))

    def _keep(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._lines.add(printable(line))

    def _note_error(self, error: BaseException) -> None:
        if isinstance(error, GaudiBatchError):
            self.note(str(error), logging.ERROR)
        elif isinstance(error, KeyboardInterrupt):
            self.note("interrupted; the same command resumes", logging.ERROR)
        else:
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.note(line, logging.CRITICAL)

    def _store_now_and_then(self, over: threading.Event) -> None:
        seconds = FIRST_WRITE_S
        while not over.wait(seconds):
            seconds = WRITE_INTERVAL_S
            self._store(WRITE_TIMEOUT_S)

    def _store(self, timeout_s: float) -> None:
        """Stores what is new, if storage takes it in time; a driver that may not hold the lease stores nothing."""
        until = time.monotonic() + timeout_s
        quick = self._storage.once()
        quick.try_timeout_s = timeout_s

        def may_go_on() -> bool:
            return self._lease.holds() and time.monotonic() < until

        def require_lease() -> None:
            if not may_go_on():
                raise TimeoutError("the lease is not certain")

        def put(path: str, data: bytes) -> None:
            quick.put(path, data, require_lease, may_go_on)

        if not self._writing.acquire(timeout=timeout_s):
            return
        try:
            self._lines.write(put)
            self._failing = False
        except TimeoutError:
            log.debug("the log is not stored: the lease is not certain")
        except StorageError as error:
            if not self._failing:
                log.warning("the log in the output is not up to date: %s", error)
            self._failing = True
        finally:
            self._writing.release()


class _Listeners:
    """The keepers of this process's runs, and what has to be put back when the last of them is over."""

    def __init__(self) -> None:
        self.keepers: list[LogKeeper] = []
        self.level_before: int | None = None
        """Of the package's logger; None while it is as the application has set it."""
        self.propagated = False
        """Whether that logger gave its records to the handlers above, which the keepers do now."""
        self._filtered: list[logging.Handler] = []
        self._lock = threading.Lock()

    def add(self, keeper: LogKeeper) -> None:
        with self._lock:
            if not self.keepers and package_log.getEffectiveLevel() > logging.INFO:
                self._lower_level()
            self.keepers.append(keeper)
            package_log.addHandler(keeper)

    def remove(self, keeper: LogKeeper) -> None:
        with self._lock:
            package_log.removeHandler(keeper)
            self.keepers.remove(keeper)
            if not self.keepers and self.level_before is not None:
                self._restore_level(self.level_before)

    def pass_on(self, keeper: LogKeeper, record: logging.LogRecord) -> None:
        """Gives a record to whom it would come without keepers and does not now: the handlers above, whichever there
        are by now, while this package's logger does not propagate; and, where there is no handler at all, Python's own,
        which prints warnings."""
        if self.keepers[:1] != [keeper] or not _is_for_application(record):
            return
        handlers = _handlers_above()
        if self.propagated:
            for handler in handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)
        last, of_package = logging.lastResort, [*package_log.handlers, *logging.getLogger(record.name).handlers]
        if handlers or last is None or not all(isinstance(handler, LogKeeper) for handler in of_package):
            return
        if record.levelno >= last.level:
            last.handle(record)

    def _lower_level(self) -> None:
        self._filtered = _handlers_of_package()
        for handler in self._filtered:
            handler.addFilter(_is_for_application)
        self.level_before, self.propagated = package_log.level, package_log.propagate
        package_log.propagate = False
        package_log.setLevel(logging.INFO)

    def _restore_level(self, level: int) -> None:
        if package_log.level == logging.INFO:  # else the application has set it meanwhile
            package_log.setLevel(level)
        package_log.propagate = package_log.propagate or self.propagated
        self.level_before, self.propagated = None, False
        for handler in self._filtered:
            handler.removeFilter(_is_for_application)


_listeners = _Listeners()


def _handlers_of_package() -> list[logging.Handler]:
    """The application's handlers of this package's logger and of those of single modules."""
    names = [name for name in logging.root.manager.loggerDict if f"{name}.".startswith(f"{package_log.name}.")]
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    return [handler for handler in handlers if not isinstance(handler, LogKeeper)]


def _handlers_above() -> list[logging.Handler]:
    """Those that records come to from this package's logger, if it propagates them."""
    handlers: list[logging.Handler] = []
    logger = package_log.parent if package_log.propagate or _listeners.propagated else None
    while logger is not None:
        handlers += logger.handlers
        logger = logger.parent if logger.propagate else None
    return handlers


def _is_for_application(record: logging.LogRecord) -> bool:
    """Whether a record would be there without a keeper."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        level = logger.level
        if logger is package_log and _listeners.level_before is not None:
            level = _listeners.level_before
        if level:
            return record.levelno >= level
        logger = logger.parent
    return True
