"""The records of shards that are made: committed, dropped, or kept until it is known which."""

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
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import read as read_manifest
from gaudi_batch.plan import Shard

log = logging.getLogger(__name__)

COMMIT_THREADS = 8
COMMIT_TIMEOUT_S = 5.0
"""How long the end of a run waits for commits that have been begun."""
PROBE_BYTES = 1 << 20
"""About as large as an image, so that a disk which has no room for one has none for this."""


class Committer:
    """The records of shards, by their attempts.

    Args:
        ledger: the output's records.
        account: hears of commits.
    """

    def __init__(self, ledger: Ledger, progress: RunProgress) -> None:
        self._ledger = ledger
        self._progress = progress
        self._records: dict[str, Done] = {}
        self._pool = ThreadPoolExecutor(COMMIT_THREADS, "commit")
        self._under_way: set[asyncio.Task[None]] = set()

    def keep(self, done: Done) -> None:
        """A card has made a shard."""
        self._records[done.attempt] = done

    def discard(self, attempt: str) -> None:
        """Drops a record."""
        log.warning("attempt %s is dropped: rows that failed in it could be made after all", attempt)
        del self._records[attempt]

    def begun(self, commit: asyncio.Task[None]) -> None:
        """A task that commits has begun; it can't be taken back."""
        self._under_way.add(commit)
        commit.add_done_callback(self._under_way.discard)

    async def commit(self, attempt: str) -> int:
        """Puts the manifest of an attempt, unless another driver has committed the shard; returns the shard's number.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed.
        """
        done = self._records[attempt]
        self._ledger.in_doubt.add(attempt)

        def put() -> tuple[bool, pa.Table | None]:
            is_ours = self._ledger.commit(done.facts, done.manifest)
            return is_ours, read_manifest(done.manifest)[0] if done.facts.failed_rows else None

        is_ours, table = await asyncio.get_running_loop().run_in_executor(self._pool, put)
        del self._records[attempt]
        if is_ours:
            self._progress.committed(done.facts, table)
        else:
            log.warning("shard %d: another driver has committed it, so its manifest stays", done.facts.shard)
        return done.facts.shard

    async def close(self, *, wait: bool) -> None:
        """Takes no more commits.

        Args:
            wait: whether those that have been begun are waited for, for COMMIT_TIMEOUT_S.
        """
        # A thread that commits goes on whatever becomes of its task.
        if self._under_way and wait:
            await asyncio.wait(self._under_way, timeout=COMMIT_TIMEOUT_S)
        self._pool.shutdown(wait=False)


def check_storage(ledger: Ledger, prompts: PromptDataset, shard: Shard, driver: str) -> str | None:
    """Finds out whether storage fails for this process, too, as a card says it does: at all, or at a shard's rows.

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
    # Named as this driver's attempts are, so that it is removed with what these leave behind.
    probe = f"images/{attempt_name(shard.number, f'{driver}0')}"
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
