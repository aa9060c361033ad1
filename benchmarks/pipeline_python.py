"""How many images a second one CPU card makes of the built-in model, and what share of that time is not arithmetic.

The share is what remains of a call when the time inside PyTorch's operators is taken away: the pipeline's, the
scheduler's and the tokenizer's own Python. The operators are timed by PyTorch's profiler in calls of their own.
"""

from __future__ import annotations

import argparse
import statistics
import time

from torch.profiler import ProfilerActivity, profile

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import Item
from gaudi_batch.pipelines.cpu import CpuPipeline
from gaudi_batch.pipelines.sources import describe_model
from gaudi_batch.plan import Bucket


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calls", type=int, default=15)
    arguments = parser.parse_args()

    config = JobConfig(prompts="-", output="-", model="builtin:shapes", device="cpu")
    pipeline = CpuPipeline(describe_model(config), arguments.threads, "float32")
    bucket = Bucket(64, 64, arguments.steps, 3.0)
    items = [Item(row, 0, "a large red circle on a blue background", "", row) for row in range(arguments.batch_size)]
    pipeline.generate(bucket, items)
    seconds, shares = [], []
    for _ in range(arguments.calls):
        started = time.perf_counter()
        pipeline.generate(bucket, items)
        seconds.append(time.perf_counter() - started)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            pipeline.generate(bucket, items)
        operators = sum(event.self_cpu_time_total for event in profiled.key_averages() if event.key != "[memory]") / 1e6
        shares.append(1 - operators / seconds[-1])
    call = statistics.median(seconds)
    print(
        f"{arguments.batch_size / call:.2f} images/s ({arguments.batch_size / max(seconds):.2f} to"
        f" {arguments.batch_size / min(seconds):.2f}) on {arguments.threads} threads, {call:.3f} s a call of"
        f" {arguments.batch_size}; outside of operators {statistics.median(shares):.1%}"
        f" ({min(shares):.1%} to {max(shares):.1%})"
    )


if __name__ == "__main__":
    main()
