"""When each card made what: the batches of a run, from its throughput lines."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple

from gaudi_batch.layout import throughput_path
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.progress import is_sane
from gaudi_batch.output.reader import READ_THREADS
from gaudi_batch.output.records import RunRecords, json_lines
from gaudi_batch.output.throughput import rounded
from gaudi_batch.text import one_line

MAX_SHARDS_READ = 10_000
"""Shards whose throughput lines are read, which takes a request each. Of a run with more, the sums in the manifests are
taken, so that a shard is one stretch of time."""


READ_TIMEOUT_S = 60.0
MAX_S = 2 * 86400.0
"""Seconds beyond which a batch, or a wait for one, can't be."""
MAX_BATCH_IMAGES = 1_000_000
MAX_COUNTER = 1e5
"""Watts or degrees beyond which a counter is wrong."""


class Batch(NamedTuple):
    """Some images that a card made in one stretch of time: those of one pipeline call, or of several."""

    card: str
    attempt: str
    shard: int
    start: float
    """When the device began, in seconds since the epoch by the driver's clock."""
    generate_s: float
    wait_s: float
    """Seconds for which the device was idle before."""
    images: int
    warmup: bool
    calls: int = 1
    """How many calls of the pipeline it is."""
    watts: float | None = None
    temperature_c: float | None = None
    throttled: str = ""
    """Why the card's clock was lowered; empty if it was not."""

    @property
    def stop(self) -> float:
        """When the device ended."""
        return self.start + self.generate_s


def read_batches(records: RunRecords, timeout_s: float = READ_TIMEOUT_S) -> list[Batch]:
    """The committed batches of a run, in order of their shards. Raises StorageError.

    Args:
        records: of the run.
        timeout_s: seconds after which no more lines are read, and the sums in the manifests are taken.
    """
    until = time.monotonic() + timeout_s
    infos = [commit.info for commit in records.commits]
    if len(infos) > MAX_SHARDS_READ:
        return [batch for info in infos for batch in _of_sums(info)]
    storage = records.reader.storage
    batches: list[Batch] = []

    def read(info: CommitInfo) -> bytes | None:
        late = time.monotonic() > until
        return None if late else storage.get(throughput_path(info.card, info.shard, info.attempt))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for info, data in zip(infos, pool.map(read, infos), strict=True):
            lines = [batch for line in json_lines(data) if (batch := _of_line(line, info)) is not None]
            # Lines that are gone, or are not those that were committed, say less than the manifest.
            whole = len(lines) == info.sums.batches
            batches += lines if whole else _of_sums(info)
    return batches


def _of_line(line: dict[str, Any], info: CommitInfo) -> Batch | None:
    try:
        generate_s = float(line["generate_s"])
        # An older version has only the time at which the images were stored.
        at = line.get("started_at") or line["time"]
        start = datetime.fromisoformat(str(at).replace("Z", "+00:00")).timestamp()
        if not line.get("started_at"):
            start -= generate_s
        warmup = line["phase"] == "warmup"
        wait_s, images = float(line["wait_s"]), int(line["images"])
        counters: dict[str, Any] = {
            "throttled": one_line(line["throttled"]) if isinstance(line.get("throttled"), str) else ""
        }
        for name in ("watts", "temperature_c"):
            value = line.get(name)
            counters[name] = value if is_sane(value) and 0 <= value <= MAX_COUNTER else None
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    if not (0 <= generate_s <= MAX_S and 0 <= wait_s <= MAX_S and 0 <= images <= MAX_BATCH_IMAGES and 0 < start < 1e11):
        return None
    return Batch(info.card, info.attempt, info.shard, start, generate_s, wait_s, images, warmup, **counters)


def _of_sums(info: CommitInfo) -> Iterator[Batch]:
    """The batches of a shard as one stretch of warm-up and one of steady work that ends with its last image."""
    sums = info.sums
    if info.finished_at is None or not sums.batches:
        return
    steady_calls = round(sums.batches * sums.steady_images / sums.images) if sums.images else 0
    start = info.finished_at - sums.steady_s - sums.warmup_s
    wait_s = sums.wait_s
    for seconds, images, calls, warmup in (
        (sums.warmup_s, sums.images - sums.steady_images, max(1, sums.batches - steady_calls), True),
        (sums.steady_s, sums.steady_images, max(1, steady_calls), False),
    ):
        if seconds > 0:
            yield Batch(info.card, info.attempt, info.shard, start, seconds, wait_s, images, warmup, calls)
            start, wait_s = start + seconds, 0.0


def counters(batches: Iterable[Batch]) -> dict[str, dict[str, Any]]:
    """What the counters of each card said during its batches: `watts` (the mean while the device generated),
    `temperature_c` (the highest) and `throttled` (every reason); a card without counters is left out."""
    by_card: dict[str, list[Batch]] = {}
    for batch in batches:
        if batch.watts is not None or batch.temperature_c is not None or batch.throttled:
            by_card.setdefault(batch.card, []).append(batch)
    described = {}
    for card, known in by_card.items():
        drawn = [(batch.watts, batch.generate_s) for batch in known if batch.watts is not None]
        seconds = sum(each for _, each in drawn)
        described[card] = {
            "watts": rounded(sum(watts * each for watts, each in drawn) / seconds) if seconds else None,
            "temperature_c": max((batch.temperature_c or 0.0 for batch in known), default=0.0) or None,
            "throttled": ", ".join(sorted({batch.throttled for batch in known} - {""})),
        }
    return described


def pace(batches: Sequence[Batch], kinds: dict[int, Any]) -> dict[str, float]:
    """How fast each card was beside the others: 1 is as fast as the median, 0.5 half as fast. Batches are compared with
    those of their own kind, warm-up left out; a card without any is left out.

    Args:
        batches: of the run.
        kinds: the kind of batches that each shard has.
    """
    seconds: dict[Any, list[float]] = {}
    steady = [batch for batch in batches if not batch.warmup and batch.generate_s > 0]
    by_card_and_kind: dict[tuple[str, Any], list[float]] = {}
    for batch in steady:
        each = batch.generate_s / batch.calls
        by_card_and_kind.setdefault((batch.card, kinds.get(batch.shard)), []).append(each)
    for (_, kind), values in by_card_and_kind.items():
        # Of each card one value, so that a card with many batches does not decide what is usual.
        seconds.setdefault(kind, []).append(sum(values) / len(values))
    usual = {kind: _median(values) for kind, values in seconds.items()}
    spent: dict[str, list[float]] = {}
    for batch in steady:
        of_card = spent.setdefault(batch.card, [0.0, 0.0])
        of_card[0] += usual[kinds.get(batch.shard)] * batch.calls
        of_card[1] += batch.generate_s
    return {card: expected / took for card, (expected, took) in spent.items()}


def _median(values: Sequence[float]) -> float:
    """The lower median: of two cards the faster one is the usual one."""
    return sorted(values)[(len(values) - 1) // 2]
