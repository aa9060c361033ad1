"""For how long a card's device waits between its first batch and its last, with a store that is near and one that is
far.

    python -m benchmarks.idle --cards 2 --prompts 160

Prompts are read from an S3 server and images are stored there, through a proxy that holds each request for 0 or 50 ms.
What a device waits for after its batch, until its next one, is in the run's throughput lines.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

import fsspec
from faultproxy import Fault, fault_proxy

from benchmarks.harness import (
    BATCH_SIZE,
    FIGURES,
    Batch,
    figures,
    ray_started,
    read_batches,
    ready_times,
    run_command,
    s3_server,
    scratch,
    storage_flags,
    write_prompts,
)
from benchmarks.report import Benchmark, Row, size_flags

CARDS = 4
BATCHES = 40
"""Of each card."""
DELAYS_MS = (0, 50)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures at each latency."""
    cards = options.cards or CARDS
    prompts = options.prompts or cards * BATCHES * BATCH_SIZE
    for delay_ms in DELAYS_MS if options.delay_ms is None else [options.delay_ms]:
        yield f"{prompts:,} prompts, {cards} cards, S3 with {delay_ms:g} ms", measure_delay(cards, prompts, delay_ms)


def measure_delay(cards: int, prompts: int, delay_ms: float) -> dict[str, float]:
    """One run."""
    with scratch() as home, s3_server(home) as server, fault_proxy(server.port) as proxy:
        filesystem = fsspec.filesystem("s3", **server.options)
        filesystem.put(str(write_prompts(home / "prompts.parquet", prompts)), "bucket/prompts.parquet")
        if delay_ms:
            proxy.add(Fault("delayed", delay_s=delay_ms / 1000))
        flags = storage_flags(server.options_at(proxy.port))
        output = server.url("output")
        with (
            ray_started(home, cards) as cluster,
            run_command(server.url("prompts.parquet"), output, cluster.address, *flags) as command,
        ):
            command.wait()
        batches = read_batches(output, **server.options)
        measured = figures(batches, ready_times(batches, command.log), cards, command)
        upload_ms = 1000 * statistics.median(batch.upload_s / batch.images for batch in batches)
        return {"idle_share": idle_share(batches), "upload_ms": upload_ms, **{name: measured[name] for name in SHOWN}}


def idle_share(batches: list[Batch]) -> float:
    """The share of a device's time in which it waited, summed over the cards, from a card's first batch on."""
    seen: set[str] = set()
    busy = idle = 0.0
    for batch in batches:
        busy += batch.generate_s
        idle += batch.wait_s if batch.card in seen else 0.0
        seen.add(batch.card)
    return idle / (busy + idle)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of one case."""
    size_flags(parser)
    parser.add_argument("--delay-ms", type=float, help="that one alone")


SHOWN = ("device_share", "first_batch_s", "end_s", "wall_s")
COLUMNS = {
    "idle_share": ("idle between batches", ".2%"),
    "upload_ms": ("an image's upload, ms", ".0f"),
    **{name: FIGURES[name] for name in SHOWN},
}
BENCHMARK = Benchmark("idle", __doc__, COLUMNS, measure, add_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
