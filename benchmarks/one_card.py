"""One card beside a bare script: when the first batch is stored, and images a second after it.

    python -m benchmarks.one_card --prompts 160

The built-in model on the CPU, with as many torch threads in both. The script, benchmarks/bare_script.py, imports
diffusers, loads the model and calls it with batches of 8, and saves PNG files. The job runs on a Ray that is there
already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import BATCH_SIZE, Command, RayStarted, ray_started, read_batches, scratch, write_prompts
from benchmarks.report import Benchmark, Row
from gaudi_batch.pipelines.sources import builtin_directory

PROMPTS = 400
STEPS = 20
MODEL = "builtin:shapes"


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures with one torch thread, which leaves a core to all else, and with those that a job takes by itself."""
    prompts = options.prompts or PROMPTS
    for threads in [options.threads] if options.threads else [1, 2]:
        with scratch() as home, ray_started(home, 0) as cluster:
            path = write_prompts(home / "prompts.parquet", prompts)
            yield f"{prompts} prompts, {threads} threads", measure_both(path, home, cluster, threads)


def measure_both(prompts: Path, home: Path, cluster: RayStarted, threads: int) -> dict[str, float]:
    """The script, then the job."""
    bare = _script(prompts, home / "bare", threads)
    job = _job(prompts, home / "job", cluster, threads)
    figures = {
        f"{name}_{value}": float(number)
        for name, values in (("bare", bare), ("job", job))
        for value, number in values.items()
    }
    return figures | {
        "first_batch_ratio": job["first_batch_s"] / bare["first_batch_s"],
        "rate_ratio": job["images_per_s"] / bare["images_per_s"],
        "call_ratio": bare["call_s"] / job["call_s"],
    }


def _script(prompts: Path, output: Path, threads: int) -> dict[str, float]:
    model = builtin_directory(MODEL)
    flags = ("--model", model, "--threads", threads, "--steps", STEPS)
    command = [sys.executable, Path(__file__).with_name("bare_script.py"), prompts, output, *flags]
    started = time.time()
    printed = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True).stdout
    lines = [json.loads(line) for line in printed.splitlines()]
    return _figures(started, [line["time"] for line in lines], [line["generate_s"] for line in lines])


def _job(prompts: Path, output: Path, cluster: RayStarted, threads: int) -> dict[str, float]:
    where = ("--prompts", prompts, "--output", output, "--address", cluster.address)
    flags = ("--model", MODEL, "--device", "cpu", "--cards", 1, "--cpu.threads", threads, "--steps", STEPS)
    with Command([sys.executable, "-m", "gaudi_batch", "run", *map(str, where), *map(str, flags)]) as command:
        command.wait()
    batches = read_batches(output)
    return _figures(command.started, [batch.stored for batch in batches], [batch.generate_s for batch in batches])


def _figures(started: float, stored: Sequence[float], calls: Sequence[float]) -> dict[str, float]:
    """Rates from the end of the first batch on."""
    return {
        "first_batch_s": stored[0] - started,
        "images_per_s": BATCH_SIZE * (len(stored) - 1) / (stored[-1] - stored[0]),
        "call_s": statistics.median(calls[1:]),
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of one case."""
    parser.add_argument("--prompts", type=int, help=f"how many (default: {PROMPTS})")
    parser.add_argument("--threads", type=int, help="measure one case, with so many torch threads")


COLUMNS = {
    "bare_first_batch_s": ("first batch, s, script", ".1f"),
    "job_first_batch_s": ("first batch, s, job", ".1f"),
    "first_batch_ratio": ("first batch, ratio", ".2f"),
    "bare_images_per_s": ("images/s, script", ".1f"),
    "job_images_per_s": ("images/s, job", ".1f"),
    "rate_ratio": ("images/s, ratio", ".2f"),
    "call_ratio": ("images/s inside the call, ratio", ".2f"),
}
BENCHMARK = Benchmark("one_card", __doc__, COLUMNS, measure, add_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
