"""Memory of the driver and of the cards over a run of many rows, so that what grows shows.

    python -m benchmarks.memory --cards 2 --prompts 20000

A million rows on four simulated cards without a sleep, into files on the local disk. Shown is the resident memory of
the driver and of the largest card when a tenth, a half and all of the images were stored, and the driver's largest,
which it may reach when it sums up.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from benchmarks.harness import (
    Batch,
    Sampler,
    process_kinds,
    ray_started,
    read_batches,
    run_command,
    scratch,
    write_prompts,
)
from benchmarks.report import Benchmark, Row, size_flags

CARDS = 4
PROMPTS = 1_000_000
NO_SLEEP = ("--simulated.batch-seconds", "0")
INTERVAL_S = 1.0
SHARES = (10, 50, 100)
"""Of the images, in percent."""
MB = 1024**2


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures of one run."""
    cards, prompts = options.cards or CARDS, options.prompts or PROMPTS
    with scratch() as home, ray_started(home, cards) as cluster:
        path = write_prompts(home / "prompts.parquet", prompts)
        with (
            run_command(path, home / "output", cluster.address, *NO_SLEEP) as command,
            Sampler(process_kinds(cluster, command), INTERVAL_S) as sampler,
        ):
            command.wait()
        batches = read_batches(home / "output")
        yield f"{prompts:,} rows, {cards} cards", figures_of(batches, sampler, command.ended - command.started)


def figures_of(batches: list[Batch], sampler: Sampler, wall_s: float) -> dict[str, float]:
    """Memory in MB when so many percent of the images were stored."""
    stored = list(itertools.accumulate(batch.images for batch in batches))
    figures = {}
    for kind, share in itertools.product(("driver", "cards"), SHARES):
        reached = next(number for number, images in enumerate(stored) if images * 100 >= stored[-1] * share)
        figures[f"{kind}_{share}_mb"] = sampler.at(batches[reached].stored).rss.get(kind, 0) / MB
    largest = max(sample.rss.get("driver", 0) for sample in sampler.samples)
    return {**figures, "driver_largest_mb": largest / MB, "wall_s": wall_s}


_NAMES = {"driver": "driver", "cards": "card"}
COLUMNS = {
    **{f"{kind}_{share}_mb": (f"{name} at {share} %, MB", ".0f") for kind, name in _NAMES.items() for share in SHARES},
    "driver_largest_mb": ("driver's largest, MB", ".0f"),
    "wall_s": ("wall, s", ".0f"),
}
BENCHMARK = Benchmark("memory", __doc__, COLUMNS, measure, size_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
