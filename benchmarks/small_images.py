"""How many small images a second eight cards store that take no time to generate them, and what is busy meanwhile.

    python -m benchmarks.small_images --cards 2 --prompts 2000 --store disk

Simulated cards without a sleep paint 64 x 64 pixels, so that all the time is that of the product, Ray and the store.
The cores that each uses are CPU seconds over seconds, between the first batch and the last.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping

from benchmarks.harness import (
    Batch,
    Sampler,
    process_kinds,
    processes_below,
    ray_started,
    read_batches,
    run_command,
    s3_server,
    scratch,
    storage_flags,
    write_prompts,
)
from benchmarks.report import Benchmark, Row, size_flags

CARDS = 8
PROMPTS = {"disk": 40_000, "s3": 10_000}
"""By store; they take about a minute on two cores."""
NO_SLEEP = ("--simulated.batch-seconds", "0")
KINDS = ("cards", "driver", "ray", "store")


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures on a local disk and on an S3 server of this machine."""
    for store in [options.store] if options.store else PROMPTS:
        cards, prompts = options.cards or CARDS, options.prompts or PROMPTS[store]
        where = "local disk" if store == "disk" else "S3 (MinIO in JuiceFS's gateway)"
        yield f"{prompts:,} images, {cards} cards, {where}", measure_store(cards, prompts, store)


def measure_store(cards: int, prompts: int, store: str, *more: str) -> dict[str, float]:
    """One run, with more flags."""
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(scratch())
        output, flags, options = str(home / "output"), [*NO_SLEEP, *more], {}
        server = stack.enter_context(s3_server(home)) if store == "s3" else None
        if server:
            output, options = server.url("output"), server.options
            flags += storage_flags(options)
        path = write_prompts(home / "prompts.parquet", prompts)
        cluster = stack.enter_context(ray_started(home, cards))
        command = stack.enter_context(run_command(path, output, cluster.address, *flags))
        kinds = process_kinds(cluster, command)

        def with_store() -> Mapping[str, Iterable[int]]:
            process = server.process if server else None
            return {**kinds(), "store": processes_below(process.pid) if process else []}

        with Sampler(with_store, 0.5) as sampler:
            command.wait()
        return figures_of(read_batches(output, **options), sampler)


def figures_of(batches: list[Batch], sampler: Sampler) -> dict[str, float]:
    """Images a second, and the cores in use, from the first batch to the last."""
    first, last = sampler.at(batches[0].stored), sampler.at(batches[-1].stored)
    images = sum(batch.images for batch in batches)
    span = batches[-1].stored - batches[0].stored
    cores = {
        kind: (last.cpu_s.get(kind, 0.0) - first.cpu_s.get(kind, 0.0)) / max(last.at - first.at, 0.001)
        for kind in KINDS
        if kind in last.cpu_s
    }
    used = {f"{kind}_cores": value for kind, value in cores.items()}
    return {"images_per_s": images / span, **used, "machine_share": sum(cores.values()) / (os.cpu_count() or 1)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of one case."""
    size_flags(parser)
    parser.add_argument("--store", choices=list(PROMPTS), help="that one alone")


COLUMNS = {
    "images_per_s": ("images/s", ".0f"),
    **{f"{kind}_cores": (f"cores, {kind.replace('ray', 'rest of Ray')}", ".2f") for kind in KINDS},
    "machine_share": ("of the machine's cores", ".0%"),
}
BENCHMARK = Benchmark("small_images", __doc__, COLUMNS, measure, add_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
