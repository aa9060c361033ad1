"""The product beside Ray Data: the same prompts, cards, batches and images, on the same Ray, one after the other.

    python -m benchmarks.ray_data --cards 4 --prompts 320

ray_data_job.py is the job in Ray Data, and says how it is tuned. Both are commands that are timed from their start to
their end, on a Ray that runs already; which of them is first changes from run to run. Ratios are those of one run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.harness import (
    BATCH_S,
    BATCH_SIZE,
    FIGURES,
    Command,
    figures,
    ray_started,
    read_batches,
    ready_times,
    run_command,
    scratch,
    write_prompts,
)
from benchmarks.report import Benchmark, Row, size_flags

CARDS = (4, 16, 32)
BATCHES = 40
"""Of each card."""
PANDAS = Path(sys.prefix, "pandas")
"""Where `make setup` puts pandas, which Ray Data imports and the product does not."""
COMPARED = ("wall_s", "first_batch_s", "device_share", "excess_batches")
_turn = itertools.count()


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures of both, and their ratios, at each number of cards."""
    product_first = next(_turn) % 2 == 0
    for cards in [options.cards] if options.cards else CARDS:
        prompts = options.prompts or cards * BATCHES * BATCH_SIZE
        yield f"{prompts:,} prompts, {cards} cards", compare(cards, prompts, product_first)


def compare(cards: int, prompts: int, product_first: bool) -> dict[str, float]:
    """Runs both."""
    with scratch() as home, ray_started(home, cards) as cluster:
        path = write_prompts(home / "prompts.parquet", prompts)
        jobs = {
            "product": run_command(path, home / "product", cluster.address),
            "ray_data": ray_data_command(path, home / "ray_data", cluster.address, cards),
        }
        made = {}
        for name in sorted(jobs, reverse=not product_first):
            with jobs[name] as command:
                command.wait()
            made[name] = figures_of(command, home / name, cards)
            require_images(home / name, prompts)
    both = {f"{name}_{figure}": made[name][figure] for figure in COMPARED for name in jobs}
    ratios = {f"{figure}_ratio": made["ray_data"][figure] / made["product"][figure] for figure in COMPARED[:3]}
    return both | ratios


def ray_data_command(prompts: Path, output: Path, address: str, cards: int) -> Command:
    """The job of ray_data_job.py."""
    job = [sys.executable, "-m", "benchmarks.ray_data_job", "--prompts", str(prompts), "--output", str(output)]
    size = ["--cards", str(cards), "--batch-size", str(BATCH_SIZE), "--batch-seconds", str(BATCH_S)]
    return Command([*job, "--address", address, *size], {"PYTHONPATH": str(PANDAS)})


def figures_of(command: Command, output: Path, cards: int) -> dict[str, float]:
    """What one of the two did."""
    batches = read_batches(output)
    return figures(batches, ready_times(batches, command.log), cards, command)


def require_images(output: Path, prompts: int) -> None:
    """Raises RuntimeError unless there is an image, and a row in Parquet, for each prompt."""
    images = sum(1 for _ in output.rglob("*.png"))
    rows = sum(pq.read_metadata(path).num_rows for path in output.glob("manifest/*.parquet"))
    if (images, rows) != (prompts, prompts):
        raise RuntimeError(f"{output} has {images} images and {rows} rows for {prompts} prompts")


_WHO = {"product": "gaudi-batch", "ray_data": "Ray Data"}
_RATIOS = {f"{figure}_ratio": (f"{FIGURES[figure][0].removesuffix(', s')}, ratio", ".2f") for figure in COMPARED[:3]}
_FIGURES = {
    f"{name}_{figure}": (f"{FIGURES[figure][0]}, {who}", FIGURES[figure][1])
    for figure in COMPARED
    for name, who in _WHO.items()
}
BENCHMARK = Benchmark("ray_data", __doc__, _FIGURES | _RATIOS, measure, size_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
