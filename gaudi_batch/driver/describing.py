"""Describes the images of a run while it goes on, so that whoever opens their directory finds those that are committed,
each once, and no other.

The description is written anew at the first commit, and then so rarely that it takes a small share of the time.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from gaudi_batch.driver.rerun import latest_shards_of_rows
from gaudi_batch.driver.run_context import Run
from gaudi_batch.errors import GaudiBatchError
from gaudi_batch.output.joined import put_description

log = logging.getLogger(__name__)

INTERVAL_S = 10.0
"""Seconds between two times that it is written, at least."""
SHARE = 20
"""Times as long as it took to write it that passes before the next time."""


class Description:
    """Writes `images/metadata.parquet` of a run of format `files`.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, "describe")
        self._lock = threading.Lock()
        self._under_way: Future[None] | None = None
        self._due = 0.0
        self._closed = False

    def committed(self) -> None:
        """A shard has been committed; may be called from several threads."""
        with self._lock:
            is_free = self._under_way is None or self._under_way.done()
            if is_free and not self._closed and time.monotonic() >= self._due:
                self._under_way = self._pool.submit(self._write)

    def close(self, *, wait: bool) -> None:
        """Writes it no more.

        Args:
            wait: whether to wait for one that is being written: it must not land after the one of the run's end.
        """
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=wait)

    def _write(self) -> None:
        began = time.monotonic()
        try:
            in_place = self._run.commits.shards()
            plan = [shard for shard in self._run.plan if shard.number in in_place]
            put_description(self._run.commits, latest_shards_of_rows(plan, self._run.job.dataset))
        except GaudiBatchError as error:
            log.debug("the images are described later: %s", error)
        now = time.monotonic()
        self._due = now + max(INTERVAL_S, SHARE * (now - began))
