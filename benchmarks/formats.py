"""What each output format costs: images a second to S3, and memory of a card with a shard of the largest size.

    python -m benchmarks.formats --cards 2 --prompts 2000

Simulated cards without a sleep paint 64 x 64 pixels, as in `small_images`. The memory is that of a process which stores
a shard of 1,024 images, the most that a shard has unless the job says otherwise, of 1.5 MB each, as a card does, from
four threads, on the local disk: its largest resident memory beside that before the first image.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.harness import scratch
from benchmarks.report import Benchmark, Row, size_flags
from benchmarks.small_images import measure_store

FORMATS = ("files", "webdataset", "parquet")
CARDS, PROMPTS = 8, 10_000
SHARD_IMAGES = 1024
SIDE = 704
"""Pixels of a square of noise whose PNG has 1.5 MB, as a photograph of a megapixel has."""


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures of each format."""
    cards, prompts = options.cards or CARDS, options.prompts or PROMPTS
    for name in FORMATS:
        where = "S3 (MinIO in JuiceFS's gateway)"
        yield (
            f"{name}: {prompts:,} images, {cards} cards, {where}",
            measure_store(cards, prompts, "s3", "--format", name),
        )
    for name in FORMATS:
        images = options.prompts or SHARD_IMAGES
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            yield f"{name}: a shard of {images:,} images of 1.5 MB", pool.apply(store_shard, (name, images))


def store_shard(name: str, images: int) -> dict[str, float]:
    """Stores one shard; memory in MB and seconds."""
    import numpy as np
    import pyarrow as pa

    from gaudi_batch import JobConfig
    from gaudi_batch.dataset.rows import PromptRow
    from gaudi_batch.output import manifest
    from gaudi_batch.output.formats import output_of
    from gaudi_batch.output.formats.base import Attempt
    from gaudi_batch.output.manifest import CommitInfo, ImageInfo, StoredImage
    from gaudi_batch.output.throughput import ThroughputTotals
    from gaudi_batch.plan import Bucket
    from gaudi_batch.storage.store import Storage

    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    rows = [
        PromptRow(row, str(row), "a prompt", "", None, Bucket(SIDE, SIDE, 50, 7.5), 1, None) for row in range(images)
    ]
    with scratch() as home:
        config = JobConfig(prompts="p", output=str(home), format=name, device="simulated")
        output = output_of(config, Storage(str(home)), Attempt(0, "aaaaa1"))
        before = peak_mb()
        began = time.monotonic()

        def add(row: int) -> StoredImage:
            return output.add(row, 0, np.roll(noise, row, 0))

        with ThreadPoolExecutor(4) as pool:
            stored = dict(enumerate(pool.map(add, range(images))))
        made = time.monotonic()
        info = CommitInfo(0, "aaaaa1", "card", "node", None, images, 0, images, ThroughputTotals(), format=name)
        infos = {(row, 0): ImageInfo(image, row, None, False) for row, image in stored.items()}
        output.finish(manifest.tabulate(rows, pa.table({"topic": ["t"] * images}), infos, {}, 0, info))
        return {"more_mb": peak_mb() - before, "store_s": made - began, "finish_s": time.monotonic() - made}


def peak_mb() -> float:
    """The largest resident memory of this process so far; `getrusage` begins with that of the process before it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


COLUMNS = {
    "images_per_s": ("images/s", ".0f"),
    "cards_cores": ("cores, cards", ".2f"),
    "store_cores": ("cores, store", ".2f"),
    "more_mb": ("memory of the format, MB", ".0f"),
    "store_s": ("encoding and storing, s", ".1f"),
    "finish_s": ("writing the object, s", ".1f"),
}
BENCHMARK = Benchmark("formats", __doc__, COLUMNS, measure, size_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
