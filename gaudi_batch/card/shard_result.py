"""The record of a shard that a card has made: its manifest, its throughput lines, its outcome."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone

from gaudi_batch.card.clock import DriverClock
from gaudi_batch.card.messages import CardSetup, Done
from gaudi_batch.card.readings import Readings
from gaudi_batch.card.shard_runner import MadeImage, ShardMaker, ShardRows
from gaudi_batch.card.telemetry import Mark
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import throughput_path
from gaudi_batch.output import manifest
from gaudi_batch.output.formats.base import OutputFormat
from gaudi_batch.output.manifest import StoredImage
from gaudi_batch.output.throughput import BatchLine, ThroughputTotals
from gaudi_batch.pipelines.base import Item
from gaudi_batch.scheduling.events import ShardOutcome
from gaudi_batch.text import describe_error


@dataclass(frozen=True)
class CardIdentity:
    """How records name a card."""

    name: str
    node: str
    """Its node's host name."""
    module: int | None
    """The module that Ray pinned; None where the device has none."""
    device: str
    """What its pipeline says of the device."""


@dataclass(frozen=True)
class PipelineCall:
    """How one call of the pipeline went."""

    phase: str
    """`warmup` or `steady`."""
    generate_s: float
    """Seconds that it took."""
    wait_s: float
    """Seconds for which the device was idle before it."""
    started: float = 0.0
    """When it began, by this node's clock, in seconds since the epoch."""
    mark: Mark | None = None
    """Where the device's counters are read at its end."""


@dataclass
class StoredBatch:
    """The images of one call, in storage or on their way there."""

    attempt: str
    call: PipelineCall
    number: int
    """Number of the batch within its attempt."""
    images: list[tuple[Item, bool | None, bool]] = field(default_factory=list)
    """For each image its item, whether it is not safe for work, and whether its prompt was truncated."""
    futures: list[Future[StoredImage]] = field(default_factory=list)
    """Futures of the same images."""
    finished_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    """When the last of its images was stored, by this node's clock."""

    def add(self, image: MadeImage, future: Future[StoredImage]) -> None:
        """Adds an image that is being stored. Its pixels are not kept: the images of a shard may not fit into
        memory."""
        self.images.append((image.item, image.nsfw, image.truncated))
        self.futures.append(future)


class ShardRecorder:
    """Makes the records of the shards that a card makes.

    Args:
        setup: the job.
        clock: tells what the driver's clock showed.
    """

    def __init__(self, setup: CardSetup, clock: DriverClock) -> None:
        self._setup = setup
        self._clock = clock

    def record(
        self, card: CardIdentity, shard: ShardRows, output: OutputFormat, maker: ShardMaker, batches: list[StoredBatch]
    ) -> Done:
        """Waits until the images are stored, removes those of rows that failed after all, and stores the throughput
        lines; returns the record.

        Args:
            card: what records call this card.
            shard: the shard.
            output: where its images are.
            maker: what has made them.
            batches: its calls.

        Raises:
            StorageError: storage failed.
        """
        _note_encode_errors(batches, maker)
        images: dict[tuple[int, int], manifest.ImageInfo] = {}
        lines: list[BatchLine] = []
        for batch in batches:
            before = len(images)
            stored = [future.result() for future in batch.futures if future.exception() is None]
            for (item, nsfw, truncated), future in zip(batch.images, batch.futures, strict=True):
                if future.exception() is not None:
                    continue
                if item.row in maker.failures:
                    output.drop(future.result())
                else:
                    info = manifest.ImageInfo(future.result(), item.seed, nsfw, truncated)
                    images[item.row, item.image] = info
            lines.append(self._line(card, shard, batch, len(images) - before, stored))
        number, attempt = shard.task.shard.number, shard.task.attempt
        commit = self._commit(card, shard, lines, batches, len(maker.failures), len(images))
        seed = self._setup.job.config.seed
        table = manifest.tabulate(shard.rows, shard.carried, images, maker.failures, seed, commit)
        if commit.has_members:
            began = time.monotonic()
            digest, now = output.finish(table), datetime.now(timezone.utc)
            table = manifest.with_finish(table, now)
            if lines:
                took = lines[-1].upload_s + time.monotonic() - began
                lines[-1] = replace(lines[-1], upload_s=round(took, 6))
            finished_at = self._clock.convert(now.timestamp())
            sums = ThroughputTotals.of(lines)
            commit = replace(commit, sums=sums, object_sha256=digest, finished_at=finished_at)
        text = "".join(f"{line.json()}\n" for line in lines)
        self._setup.storage.put(throughput_path(card.name, number, attempt), text.encode())
        outcome = ShardOutcome(
            rows=commit.rows,
            failed_rows=commit.failed_rows,
            raised_rows=len(maker.raised),
            undecoded_rows=sum(row.unreadable for row in shard.rows),
            seconds=commit.sums.steady_s + commit.sums.warmup_s,
            transient_failures=maker.transient_failures,
            doubted=maker.doubted,
        )
        return Done(attempt, manifest.encode(table, commit), commit, outcome)

    def _commit(
        self,
        card: CardIdentity,
        rows: ShardRows,
        lines: list[BatchLine],
        batches: list[StoredBatch],
        failed_rows: int,
        images: int,
    ) -> manifest.CommitInfo:
        shard = rows.task.shard
        last = max((batch.finished_at for batch in batches), default=datetime.now(timezone.utc))
        bad_rows = [row.row for row in rows.rows if row.error is not None and not row.unreadable]
        return manifest.CommitInfo(
            shard=shard.number,
            attempt=rows.task.attempt,
            card=card.name,
            node=card.node,
            module=card.module,
            rows=len(rows.rows),
            failed_rows=failed_rows,
            images=images,
            sums=ThroughputTotals.of(lines),
            run=self._setup.run_id,
            format=self._setup.job.config.format,
            again=shard.is_rerun,
            failed_before=shard.failed_before,
            images_before=shard.images_before,
            finished_at=self._clock.convert(last.timestamp()),
            bad_rows=tuple(bad_rows[: manifest.MAX_BAD_ROWS]),
        )

    def _line(
        self, card: CardIdentity, shard: ShardRows, batch: StoredBatch, kept: int, stored: list[StoredImage]
    ) -> BatchLine:
        call = batch.call
        return BatchLine(
            time=batch.finished_at.isoformat(timespec="milliseconds"),
            card=card.name,
            node=card.node,
            module=card.module,
            device=card.device,
            shard=shard.task.shard.number,
            batch=batch.number,
            bucket=shard.task.shard.bucket._asdict(),
            phase=call.phase,
            images=kept,
            padding=self._setup.job.config.batch_size - kept,
            generate_s=round(call.generate_s, 6),
            images_per_s=round(kept / max(call.generate_s, 1e-9), 4),
            wait_s=round(call.wait_s, 6),
            encode_s=round(sum(image.encode_s for image in stored), 6),
            upload_s=round(sum(image.upload_s for image in stored), 6),
            started_at=datetime.fromtimestamp(self._clock.convert(call.started), timezone.utc).isoformat(
                timespec="milliseconds"
            ),
            **asdict(call.mark.readings() if call.mark is not None else Readings()),
        )


def encode_error(item: Item, error: BaseException) -> str:
    """The error of a row with an image that can't be encoded."""
    return f"image {item.image} can't be encoded: {describe_error(error)}"


def _note_encode_errors(batches: list[StoredBatch], maker: ShardMaker) -> None:
    """Doubts the rows with an image that could not be encoded. Raises StorageError if one could not be stored."""
    for batch in batches:
        for (item, _, _), future in zip(batch.images, batch.futures, strict=True):
            error = future.exception()
            if isinstance(error, StorageError):
                raise error
            if error is not None:
                maker.failures[item.row] = maker.doubted[item.row] = encode_error(item, error)
                maker.raised.add(item.row)
