"""Describes the images of a run while it goes on, so that whoever opens their directory finds those that are committed,
each once, and no other.

The description is written anew after a commit, but so rarely that it takes a small share of the time.
"""

from __future__ import annotations

import logging
import threading
import time

from gaudi_batch.driver.run_context import Run
from gaudi_batch.output.joined import begin_description, put_description
from gaudi_batch.text import describe_error

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
"""Seconds between two times that it is written, at least."""
SHARE = 20
"""Times as long as it took to write it that passes before the next time."""
END_TIMEOUT_S = 5.0
"""Seconds for which a run that stops waits for one that is being written."""


class Description:
    """Writes `images/metadata.parquet` of a run of format `files`.

    Rows that are about to be made again are left out: their images may be missing, or torn.

    Args:
        run: the run, of which no card stores an image yet.

    Raises:
        StorageError: it is not there and can't be written.
    """

    def __init__(self, run: Run) -> None:
        begin_description(run.ledger)
        self._run = run
        self._has_changed = threading.Event()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._write_when_due, name="describe", daemon=True)
        if run.commits.by_shard:
            self._has_changed.set()
        self._thread.start()

    def committed(self) -> None:
        """A shard has been committed; may be called from several threads."""
        self._has_changed.set()

    def close(self, *, wait: bool) -> None:
        """Writes it no more.

        Args:
            wait: whether to wait for one that is being written, however long: it must not land after the one of the
                run's end.
        """
        self._is_over.set()
        self._has_changed.set()
        self._thread.join(None if wait else END_TIMEOUT_S)

    def _write_when_due(self) -> None:
        while self._has_changed.wait() and not self._is_over.is_set():
            self._has_changed.clear()
            began = time.monotonic()
            try:
                put_description(self._run.commits, self._run.latest_shard_of_row)
            except Exception as error:
                log.debug("the images are described later: %s", describe_error(error))
            self._is_over.wait(max(INTERVAL_S, SHARE * (time.monotonic() - began)))
