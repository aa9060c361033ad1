"""What keeping to captured graphs is worth: the same job with the product's schedule and with one in plan order.

Rows ask for one of six shapes at random. To be run on (emulated) Gaudi cards:

    gaudi-batch emulate --modules 4 --capture-seconds 5 --state STATE -- python benchmarks/affinity.py STATE
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from gaudi_batch import JobConfig, run
from gaudi_batch.scheduling import dispatch

SHAPES = [(64, 64), (96, 64), (64, 96), (96, 96), (128, 64), (64, 128)]


def next_of_the_plan(self: Any, card: object) -> object:
    """`Dispatch._choose_key` without affinity: the key of the plan's next shard."""
    fresh = self.pending.fresh
    return min(fresh, key=lambda key: next(iter(fresh[key])), default=None)


def main() -> None:
    """Runs the job both ways, in turn, and prints captures and seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="the emulator's state directory, in which it counts")
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--shard-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    home = Path(tempfile.mkdtemp(prefix="affinity-"))
    shapes = [SHAPES[row % len(SHAPES)] for row in range(arguments.rows)]
    random.Random(0).shuffle(shapes)
    table = {
        "prompt": [f"a large red circle on a blue background, number {row}" for row in range(arguments.rows)],
        "width": [width for width, _ in shapes],
        "height": [height for _, height in shapes],
    }
    pq.write_table(pa.table(table), home / "prompts.parquet")
    product = dispatch.Dispatch._choose_key
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    cards = int(ray.cluster_resources()["HPU"])
    for name, choose in (("with affinity", product), ("in plan order", next_of_the_plan)):
        dispatch.Dispatch._choose_key = choose  # type: ignore[assignment, method-assign]
        shutil.rmtree(arguments.state / "counters", ignore_errors=True)
        job = JobConfig(
            prompts=str(home / "prompts.parquet"),
            output=str(home / name.replace(" ", "-")),
            model="builtin:shapes",
            device="hpu",
            steps=arguments.steps,
            shard_size=arguments.shard_size,
            cpu={"threads": 1},
        )
        started = time.monotonic()
        result = run(job)
        seconds = time.monotonic() - started
        counted = [json.loads(path.read_text()) for path in (arguments.state / "counters").glob("*.json")]
        captures = [record["captures"] for record in counted]
        print(
            f"{name}: {result.summary['images']} images on {cards} cards, {sum(captures)} captures {sorted(captures)},"
            f" {seconds:.1f} s, {result.summary['warmup_s']:.1f} s of warm-up",
            flush=True,
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
