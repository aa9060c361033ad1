"""The Ray actor of a card: it pins the card, keeps the pipeline warm, takes shards and returns their records.

Three things run side by side, with bounded queues between them: a thread that fetches the rows of the next shard, the
one thread that owns the pipeline and the device, and a pool that encodes and stores images. Calls from the driver only
touch the state that they share, so questions are answered while the device generates.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gaudi_batch.card.clock import DriverClock
from gaudi_batch.card.mailbox import Mailbox
from gaudi_batch.card.messages import Broken, CardReport, CardSetup, Dropped, Ready
from gaudi_batch.card.recipe_keeper import RecipeKeeper
from gaudi_batch.card.same_storage import require_shared
from gaudi_batch.card.shard_result import (
    CardIdentity,
    PipelineCall,
    ShardRecorder,
    StoredBatch,
    encode_error,
)
from gaudi_batch.card.shard_runner import CardFault, MadeImage, ShardMaker, ShardRows
from gaudi_batch.card.store_pool import StorePool
from gaudi_batch.card.telemetry import Telemetry
from gaudi_batch.card.warm_pipeline import WarmPipeline
from gaudi_batch.cluster.model_peers import peers_of_card
from gaudi_batch.cluster.placement import card_placement
from gaudi_batch.dataset.reader import GroupUndecoded
from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.errors import StorageError
from gaudi_batch.output.formats import output_of
from gaudi_batch.output.formats.base import Attempt, OutputFormat
from gaudi_batch.output.formats.encoding import encode
from gaudi_batch.output.manifest import StoredImage
from gaudi_batch.pipelines import load_pipeline
from gaudi_batch.pipelines.base import DeviceError, Generated, Item, OutOfDeviceMemory
from gaudi_batch.pipelines.cpus import usable_cpus
from gaudi_batch.pipelines.fetching import Files
from gaudi_batch.pipelines.gaudi_environment import recipes_of
from gaudi_batch.plan import Bucket
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.scheduling.events import (
    BatchAnnounced,
    DoubtsChecked,
    LargeBatch,
    Reading,
    ReadingAnnounced,
    ShardBegun,
    ShardFailed,
    ShardFailure,
)
from gaudi_batch.text import describe_error

STORE_THREADS = 4
"""Images that a card encodes and stores at the same time, at most."""
BATCHES_IN_STORE = 2
"""Batches that may wait for storage before the device waits, too."""


class Card:
    """One card; see the module. The driver makes it a Ray actor whose calls run in several threads.

    Args:
        setup: the job.
    """

    def __init__(self, setup: CardSetup) -> None:
        self._setup = setup
        self._started = time.monotonic()
        self._name = ""
        self._seen: set[str] = set()
        self._node_id, self._node, self._module = card_placement(setup.job.config.device)
        self._peers = peers_of_card(setup.tracker, self._node_id)
        self._storage = setup.storage
        stores = (self._storage, setup.job.dataset.storage)
        self._telemetry = Telemetry(self._module)
        self._mailbox = Mailbox(lambda: max(s.longest_running_s() for s in stores), self._telemetry.latest)
        self._clock = DriverClock()
        self._recorder = ShardRecorder(setup, self._clock)
        self._inbox: queue.Queue[ShardTask] = queue.Queue()
        self._fetched: queue.Queue[ShardRows] = queue.Queue(maxsize=1)
        self._store = StorePool(STORE_THREADS)
        self._finisher = ThreadPoolExecutor(1, "finish")
        self._store_slots = threading.Semaphore(BATCHES_IN_STORE)
        self._probes: dict[Bucket, Item] = {}
        self._pipeline: WarmPipeline
        self._recipes: RecipeKeeper
        for target in (self._fetch, self._generate):
            threading.Thread(target=self._guarded, args=(target,), name=target.__name__, daemon=True).start()

    # -- calls from the driver ----------------------------------------------------------------------------------

    def assign(self, name: str, task: ShardTask) -> None:
        """Takes a shard; an attempt that was taken before is not taken again. `name` is the card's name in the
        records."""
        self._name = name
        if task.attempt not in self._seen:
            self._seen.add(task.attempt)
            self._inbox.put(task)

    def recall(self, attempt: str) -> bool:
        """Gives a shard back if it has not begun; returns whether it does."""
        return self._mailbox.recall(attempt)

    def drop(self, attempt: str) -> None:
        """Ends an attempt that another card has overtaken, after the batch that it is at."""
        self._mailbox.drop(attempt)

    def poll(self, acknowledged: int, timeout_s: float, now: float) -> CardReport:
        """Returns what has happened after event number `acknowledged`, after at most `timeout_s` seconds. `now` is the
        driver's clock, in seconds since the epoch."""
        self._clock.hear(now)
        return self._mailbox.poll(acknowledged, timeout_s)

    # -- calls from cards of other nodes ------------------------------------------------------------------------

    def model_files(self, revision: str) -> Files:
        """The files of a model that this card has."""
        return self._peers.files(revision)

    def read_model(self, revision: str, path: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes `start` to `stop` of one of them."""
        return self._peers.read(revision, path, start, stop)

    # -- threads ------------------------------------------------------------------------------------------------

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException:
            # Without its thread, a card would look alive and do nothing.
            traceback.print_exc()
            os._exit(70)

    def _fetch(self) -> None:
        while True:
            task = self._inbox.get()
            self._mailbox.emit(ShardBegun(task.attempt, generating=False))
            try:
                with self._mailbox.reading(task.shard.number):
                    rows, carried = self._read(task)
            except Exception as error:
                self._mailbox.emit(ShardFailed(task.attempt, _failure(error)))
                continue
            self._fetched.put(ShardRows(task, rows, carried))

    def _read(self, task: ShardTask) -> tuple[list[PromptRow], pa.Table]:
        def announce(reading: Reading) -> None:
            if task.announce:
                self._mailbox.wait_for_acknowledgement(self._mailbox.emit(ReadingAnnounced(task.attempt, reading)))

        return self._setup.job.dataset.read(task.shard, self._setup.job.rules, task, announce)

    def _generate(self) -> None:
        setup = self._setup
        try:
            require_shared(setup)
            pipeline = load_pipeline(setup.job.config, setup.job.model, setup.job.threads, self._module, self._peers)
            self._recipes = RecipeKeeper(recipes_of(setup.job.config, self._storage, pipeline.stack))
        except Exception as error:
            storage = isinstance(error, StorageError) and not error.refused
            self._mailbox.emit(Broken(describe_error(error), storage))
            return
        self._pipeline = WarmPipeline(pipeline, setup.job.config.gaudi.max_graphs, self._mailbox, self._telemetry)
        brought = self._recipes.bring()
        loaded = time.monotonic() - self._started
        self._mailbox.emit(
            Ready(
                node_id=self._node_id,
                node=self._node,
                module=self._module,
                pid=os.getpid(),
                load_s=loaded,
                stack=pipeline.stack,
                model=pipeline.model,
                threads=pipeline.threads,
                cpus=usable_cpus(),
                notes=(*pipeline.notes(), *filter(None, [brought, self._telemetry.note(pipeline.device)])),
            )
        )
        self._pipeline.begin()
        while True:
            self._mailbox.enter("idle")
            if self._fetched.empty():
                self._store.let_all_work()
            work = self._fetched.get()
            if self._mailbox.begin(work.task.attempt):
                self._mailbox.emit(ShardBegun(work.task.attempt, generating=True))
                try:
                    self._make(work)
                except DeviceError as error:
                    shard, size = work.task.shard, self._setup.job.config.batch_size
                    out_of_memory = isinstance(error, OutOfDeviceMemory)
                    differ = bool(self._setup.job.model.family.text_lengths)
                    large = LargeBatch(shard.bucket.batch_kind, size, shard.number, differ) if out_of_memory else None
                    self._mailbox.emit(Broken(str(error)[:1000], large=large))
                    return
            elif self._mailbox.is_dropped(work.task.attempt):
                self._mailbox.emit(Dropped(work.task.attempt))

    def _make(self, work: ShardRows) -> None:
        task, config = work.task, self._setup.job.config
        unread = [row.error for row in work.rows if row.unreadable and row.row in task.confirm]
        if unread:
            self._mailbox.emit(ShardFailed(task.attempt, ShardFailure(f"a row to confirm can't be read: {unread[0]}")))
            return
        output = output_of(config, self._storage, Attempt(task.shard.number, task.attempt))
        if not self._make_images(work, output):
            output.close()

    def _make_images(self, work: ShardRows, output: OutputFormat) -> bool:
        """Makes a shard; returns whether its record follows, which closes its output."""
        task, config = work.task, self._setup.job.config
        bucket = task.shard.bucket
        last_call: PipelineCall

        def call(items: list[Item]) -> Generated:
            nonlocal last_call
            generated, last_call = self._pipeline.call(task.shard, items)
            return generated

        maker = ShardMaker(
            work=work,
            config=config,
            call=call,
            announce=(lambda rows: self._announce(task.attempt, rows)) if task.announce else lambda _: None,
            probe=self._probes.get(bucket),
            graph_key=lambda item: self._pipeline.graph_key(bucket, item),
        )
        stored: list[StoredBatch] = []
        storage_failed = threading.Event()
        try:
            for made in maker.batches():
                if self._mailbox.is_dropped(task.attempt):
                    self._mailbox.emit(Dropped(task.attempt))
                    return False
                if task.confirm:
                    self._try_to_encode(made, maker)
                    continue
                if not self._store_slots.acquire(blocking=False):
                    self._store.widen()
                    self._store_slots.acquire()
                batch = StoredBatch(task.attempt, last_call, len(stored))
                stored.append(self._store_batch(output, batch, made, storage_failed))
                if storage_failed.is_set():
                    break  # what is made after that is of no use
        except DeviceError:
            raise
        except CardFault as fault:
            self._mailbox.emit(
                ShardFailed(task.attempt, ShardFailure(str(fault), fault.failed_alone_once, healthy=False))
            )
            return False
        except Exception as error:
            self._mailbox.emit(ShardFailed(task.attempt, _failure(error)))
            return False
        if maker.probe is not None:
            self._probes[bucket] = maker.probe
        if task.confirm:
            self._mailbox.emit(DoubtsChecked(task.attempt, maker.failures))
            return False
        self._finisher.submit(self._finish, work, output, maker, stored)
        return True

    def _try_to_encode(self, made: list[MadeImage], maker: ShardMaker) -> None:
        for image in made:
            try:
                encode(image.pixels, self._setup.job.config.encoding)
            except Exception as error:
                maker.failures[image.item.row] = encode_error(image.item, error)

    def _announce(self, attempt: str, rows: tuple[int, ...]) -> None:
        self._mailbox.wait_for_acknowledgement(self._mailbox.emit(BatchAnnounced(attempt, rows)))

    def _store_batch(
        self, output: OutputFormat, batch: StoredBatch, made: list[MadeImage], storage_failed: threading.Event
    ) -> StoredBatch:
        left = count = len(made)
        lock = threading.Lock()

        def finished(future: Future[StoredImage]) -> None:
            nonlocal left
            self._mailbox.store(-1)
            if isinstance(future.exception(), StorageError):
                storage_failed.set()
            with lock:
                left -= 1
                if left == 0:
                    batch.finished_at = datetime.now(timezone.utc)
                    self._mailbox.stored(batch.attempt, count)
                    self._store_slots.release()

        self._mailbox.store(count)
        self._store.adjust()
        for image in made:
            future = self._store.submit(output.add, image.item.row, image.item.image, image.pixels)
            batch.add(image, future)
            future.add_done_callback(finished)
        return batch

    def _finish(self, work: ShardRows, output: OutputFormat, maker: ShardMaker, stored: list[StoredBatch]) -> None:
        """Waits until the shard's images are stored and sends its record to the driver."""
        self._recipes.keep()
        try:
            card = CardIdentity(self._name, self._node, self._module, self._pipeline.device)
            self._mailbox.emit(self._recorder.record(card, work, output, maker, stored))
        except Exception as error:
            self._mailbox.emit(ShardFailed(work.task.attempt, _failure(error)))
        finally:
            output.close()


def _failure(error: Exception) -> ShardFailure:
    """What the schedule has to know of an exception that ended an attempt."""
    storage = isinstance(error, StorageError)
    return ShardFailure(
        describe_error(error),
        undecoded={error.group: str(error)} if isinstance(error, GroupUndecoded) else {},
        healthy=not storage,
        storage=storage,
    )
