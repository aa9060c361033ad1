"""The records of finished shards: each is kept until the schedule has it committed or dropped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from gaudi_batch.card.messages import Done
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.driver.progress import RunProgress
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import attempt_name
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.plan import Shard

log = logging.getLogger(__name__)

COMMIT_THREADS = 8
CLOSE_TIMEOUT_S = 5.0
"""Seconds that the end of a run waits for commits under way."""
PROBE_BYTES = 1 << 20
"""About as large as an image: a disk without room for an image has none for the probe either."""


class Committer:
    """The records of shards, by their attempts.

    Args:
        commits: those of the run.
        progress: is told of commits.
    """

    def __init__(self, commits: Commits, progress: RunProgress) -> None:
        self._commits = commits
        self._ledger = commits.ledger
        self._progress = progress
        self._records: dict[str, Done] = {}
        self._pool = ThreadPoolExecutor(COMMIT_THREADS, "commit")
        self._under_way: set[asyncio.Task[None]] = set()

    def keep(self, done: Done) -> None:
        """Keeps the record of a shard that a card has finished."""
        self._records[done.attempt] = done

    def discard(self, attempt: str) -> None:
        """Drops a record."""
        log.warning("attempt %s is dropped: rows that failed in it could be made after all", attempt)
        del self._records[attempt]

    def begun(self, commit: asyncio.Task[None]) -> None:
        """Notes a task that commits; a commit under way can't be taken back."""
        self._under_way.add(commit)
        commit.add_done_callback(self._under_way.discard)

    async def commit(self, attempt: str) -> int:
        """Writes the manifest of an attempt unless another driver has committed the shard; returns the shard's number.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed.
        """
        done = self._records[attempt]
        self._ledger.in_doubt.add(attempt)

        def put() -> tuple[bool, pa.Table | None]:
            is_ours = self._ledger.commit(done.info, done.manifest)
            return is_ours, self._commits.add(done.info, done.manifest) if is_ours else None

        is_ours, failed = await asyncio.get_running_loop().run_in_executor(self._pool, put)
        del self._records[attempt]
        if is_ours:
            self._progress.committed(done.info, failed)
        else:
            log.warning("shard %d: another driver has committed it, so its manifest stays", done.info.shard)
        return done.info.shard

    async def close(self, *, wait: bool) -> None:
        """Takes no more commits.

        Args:
            wait: whether those that have been begun are waited for, for CLOSE_TIMEOUT_S.
        """
        # The thread of a commit goes on even if its task is cancelled.
        if self._under_way and wait:
            await asyncio.wait(self._under_way, timeout=CLOSE_TIMEOUT_S)
        self._pool.shutdown(wait=False)


def probe_attempt(driver: str) -> str:
    """The attempt under whose name a driver writes a probe. It has the driver's prefix, so what is left of the probe is
    removed with what its attempts leave."""
    return f"{driver}0"


def check_storage(ledger: Ledger, prompts: PromptDataset, shard: Shard, driver: str) -> str | None:
    """Checks a card's claim that storage fails: this process writes to the output and reads the rows of the card's
    shard.

    Args:
        ledger: the output's records.
        prompts: the prompts.
        shard: the shard that the card was at.
        driver: prefix of this driver's attempts.

    Returns:
        How the shard's rows can't be read; None if they can.

    Raises:
        StorageError: storage fails.
    """
    output = ledger.storage
    probe = f"images/{attempt_name(shard.number, probe_attempt(driver))}"
    output.once().put(f"{probe}/probe", bytes(PROBE_BYTES))
    with contextlib.suppress(StorageError):
        output.once().remove(probe)
    output.once().get("run.json")
    prompts.require_unchanged(shard.file, storage=prompts.storage.once())
    try:
        prompts.read_bytes(shard)
    except StorageError as error:
        return str(error)
    return None
