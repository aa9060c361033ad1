"""Looks for requests to stop a submitted job.

The Jobs API ends a job by SIGTERM, which carries no number, and by SIGKILL after the time that was set when the job was
submitted. So a grace of another length goes by an object in the output.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from gaudi_batch.cluster.submission import SUBMISSION_VARIABLE
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import STOP_FILE
from gaudi_batch.output.stop_request import requested_grace
from gaudi_batch.storage.store import Storage

STOP_INTERVAL_S = 3.0
"""Seconds between two looks for a request."""


@contextlib.contextmanager
def watched_for_stop(storage: Storage, stop: Callable[[float], None]) -> Iterator[None]:
    """Looks for requests to stop this process's submission; does nothing if it is no submitted job.

    Args:
        storage: the output.
        stop: called in another thread with the grace that a request gives, in seconds.
    """
    submission, over = os.environ.get(SUBMISSION_VARIABLE), threading.Event()

    def watch() -> None:
        while not over.wait(STOP_INTERVAL_S):
            with contextlib.suppress(StorageError, RuntimeError):  # the second is raised by a loop that has just ended
                grace = requested_grace(storage.once().get(STOP_FILE), submission)
                if grace is not None:
                    stop(grace)
                    storage.once().remove(STOP_FILE)

    if submission:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()
