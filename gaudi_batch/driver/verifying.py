"""Verifies the images of a run: a small one in this process, a large one on the cards, too.

The shards are verified in chunks. This process takes chunks from the end, the cards from the beginning, and when all
are taken this process takes those that the cards still have: no card that is lost or busy holds anything up. How far it
has come is stored now and then, so that the next command goes on there unless a manifest has changed since.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from gaudi_batch.driver.run_context import Run
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import VERIFYING_FILE
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.verify import VerifyReport, foreign_attempts, verify
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted, describe_error

if TYPE_CHECKING:
    from gaudi_batch.cluster.connection import CardResources

log = logging.getLogger(__name__)

CHUNK_IMAGES = 4096
"""Images of a chunk, about: at 30 ms each and 16 at a time, 8 s of reading."""
ALONE_IMAGES = 20_000
"""Images that this process verifies alone, in less time than a cluster takes to start as many processes as it has
cards."""
SAVE_INTERVAL_S = 30.0
"""Seconds between two times that it is stored how far it has come."""
MAX_AGE_S = 24 * 3600.0
"""Seconds for which what an earlier command has verified still counts."""
WAIT_S = 0.5
"""Seconds between two looks at what has ended."""


def verify_run(run: Run) -> VerifyReport:
    """Reads every image of a run; goes on where an earlier command was ended.

    Raises:
        StorageError: storage failed for longer than `storage_patience`.
    """
    chunks = _chunks(run)
    progress = _Progress(run)
    todo = {number: shards for number, shards in enumerate(chunks) if number not in progress.done}
    if progress.done:
        log.info("%s verified by an earlier command already", counted(progress.report.images, "image is", "images are"))
    images = sum(run.commits.by_shard[shard].info.images for shards in todo.values() for shard in shards)
    reports: Iterator[tuple[int, VerifyReport]]
    if images <= ALONE_IMAGES:
        reports = ((number, verify(run.ledger, shards, run.latest_shard_of_row)) for number, shards in todo.items())
    else:
        reports = _on_cards(run, todo)
    try:
        for number, report in reports:
            progress.add(number, report)
    except BaseException:
        run.ledger.storage.shut_down()  # it may be what failed, or is waited for
        progress.save()
        raise
    report = progress.report
    report.foreign += foreign_attempts(run.ledger, [commit.info for commit in run.commits.by_shard.values()])
    for paths in (report.missing, report.torn, report.foreign):
        paths.sort()
    run.ledger.remove(VERIFYING_FILE)
    return report


def _chunks(run: Run) -> list[list[int]]:
    chunks: list[list[int]] = []
    images = CHUNK_IMAGES
    for commit in run.commits.in_order():
        if images >= CHUNK_IMAGES:
            chunks.append([])
            images = 0
        chunks[-1].append(commit.info.shard)
        images += commit.info.images
    return chunks


class _Progress:
    """What is verified, and where that is stored."""

    def __init__(self, run: Run) -> None:
        self.done: set[int] = set()
        self.report = VerifyReport()
        self._ledger = run.ledger
        commits = [(commit.info.shard, commit.entry) for commit in run.commits.in_order()]
        reruns = sorted(run.latest_shard_of_row.items())
        self._digest = hashlib.sha256(json.dumps([commits, reruns, CHUNK_IMAGES]).encode()).hexdigest()
        self._saved = time.monotonic()
        stored = run.ledger.get_json(VERIFYING_FILE) or {}
        if stored.get("digest") != self._digest:
            return
        try:
            if 0 <= time.time() - float(stored["time"]) <= MAX_AGE_S:
                done, report = set(map(int, stored["done"])), VerifyReport.from_json(stored["report"])
                self.done, self.report = done, report
        except (KeyError, TypeError, ValueError, AttributeError):
            log.warning("%s/%s can't be read, and all is verified", run.ledger.storage.url, VERIFYING_FILE)

    def add(self, number: int, report: VerifyReport) -> None:
        """Takes in the report of a chunk."""
        self.done.add(number)
        self.report.add(report)
        if time.monotonic() - self._saved >= SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Stores it, as far as storage lets."""
        self._saved = time.monotonic()
        stored = {
            "digest": self._digest,
            "time": time.time(),
            "done": sorted(self.done),
            "report": self.report.as_json(),
        }
        try:
            self._ledger.put_json(VERIFYING_FILE, stored)
        except StorageError as error:
            log.warning("how far the verification has come is not stored: %s", error)
        log.info("verified %s so far", counted(self.report.images, "image"))


def _on_cards(run: Run, todo: Mapping[int, list[int]]) -> Iterator[tuple[int, VerifyReport]]:
    """Verifies chunks on the cards and in this process; yields the number and the report of each."""
    import ray
    from ray.exceptions import RayError

    cards = run.cards
    latest = run.latest_shard_of_row
    submit = _task(run.connect(), run.ledger.storage, run.info.run_id, latest)
    left, open_chunks = deque(todo), dict(todo)
    failed: deque[int] = deque()  # on a card; this process tries them
    on_cards: dict[Any, int] = {}
    log.info("%s are verified on %s and here", counted(len(todo), "chunk"), counted(cards, "card"))
    pool = ThreadPoolExecutor(1, "verify")
    here: tuple[int, Future[VerifyReport]] | None = None
    try:
        while open_chunks:
            while left and len(on_cards) < cards:
                number = left.popleft()
                on_cards[submit(open_chunks[number])] = number
            if here is None:
                while failed and failed[0] not in open_chunks:
                    failed.popleft()
                number = failed.popleft() if failed else left.pop() if left else next(iter(open_chunks))
                here = number, pool.submit(verify, run.ledger, open_chunks[number], latest)
            ended, _ = ray.wait(list(on_cards), timeout=WAIT_S) if on_cards else ([], None)
            for task in ended:
                number = on_cards.pop(task)
                try:
                    report = ray.get(task)
                except RayError as error:
                    log.warning("a card could not verify chunk %d: %s", number, describe_error(error))
                    failed.append(number)
                    continue
                if open_chunks.pop(number, None) is not None:
                    yield number, report
            if here[1].done() or not on_cards:
                number, future = here
                here = None
                report = future.result()
                if open_chunks.pop(number, None) is not None:
                    yield number, report
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for task in on_cards:
            ray.cancel(task, force=True)


def _task(
    resources: CardResources, storage: Storage, run_id: str, latest: Mapping[int, int]
) -> Callable[[list[int]], Any]:
    """What has a card verify shards."""
    import ray

    amount = {resources.name: resources.amount}
    task = ray.remote(_verify_shards).options(
        num_cpus=amount.pop("CPU", 0), resources=amount, max_retries=1, scheduling_strategy="SPREAD"
    )
    shared = ray.put((storage, run_id, latest))
    return lambda shards: task.remote(shared, shards)


def _verify_shards(shared: tuple[Storage, str, Mapping[int, int]], shards: list[int]) -> VerifyReport:
    storage, run_id, latest = shared
    reader = OutputReader(storage)
    run = reader.run()
    if run is None or run.run_id != run_id:
        raise RuntimeError(f"node {socket.gethostname()} does not see this run in {storage.url}")
    return verify(reader, shards, latest)
