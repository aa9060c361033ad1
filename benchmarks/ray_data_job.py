"""The job of `gaudi-batch run` as a user of Ray Data would write it, and tuned in good faith; ray_data.py runs it.

What its documentation (Ray 2.60: performance tips, `ActorPoolStrategy`, `DataContext`) offers, and what is used of it:

- a pool of as many actors as there are cards, of a fixed size, so that nothing is scaled up or down; an actor takes one
  HPU and no CPU, and loads its pipeline once;
- blocks of one batch (`override_num_blocks`), so that a task is a batch and the pool balances itself to the last one.
  Blocks of several batches leave cards idle at the end. `use_datasource_v2` is off, since the newer reader, which is
  on by default, makes one block of a small file whatever is asked for, and so gives one actor all the work; with
  `repartition(target_num_rows_per_block=8)` after it, the first batch came no sooner and the wall time was the same;
- `max_tasks_in_flight_per_actor` and `max_concurrent_calls_per_actor` 2, so that the next batch waits at the actor, and
  its rows are fetched while the last is generated, but no more of them wait there at the end;
- no order is kept (`preserve_order`, which is off by default), and it does not wait for all actors before it begins;
- an object store that holds everything many times over; images do not go through it: the actor writes them itself, four
  at a time as the product does, and returns a row for each;
- those rows are written as Parquet, in few files (`min_rows_per_file`);
- progress bars are off.

It has no resuming, no retries of single rows and no commits: it is what is compared for speed alone. The batch is that
of the product's simulated card, and so are the encoder and its settings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

STORE_THREADS = 4
"""As many as a card of the product has."""
ROWS_PER_FILE = 1000


class Painter:
    """A simulated card as an actor of Ray Data.

    Args:
        output: directory for images and throughput lines.
        batch_seconds: what a batch takes.
    """

    def __init__(self, output: str, batch_seconds: float) -> None:
        from gaudi_batch.config.sections import EncodingConfig, SimulatedConfig
        from gaudi_batch.pipelines.simulated import DEFAULT_SIDE, SimulatedPipeline
        from gaudi_batch.plan import Bucket

        self.pipeline = SimulatedPipeline(SimulatedConfig(batch_seconds=batch_seconds), None)
        self.bucket = Bucket(DEFAULT_SIDE, DEFAULT_SIDE, 50, 7.5)
        self.encoding = EncodingConfig()
        self.images = Path(output, "images")
        self.card = str(os.getpid())
        self.lines = Path(output, "throughput", f"{self.card}.jsonl")
        for directory in (self.images, self.lines.parent):
            directory.mkdir(parents=True, exist_ok=True)
        self.pool = ThreadPoolExecutor(STORE_THREADS)
        self.idle_since = time.monotonic()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Makes the images of a batch and writes them; returns a row for each."""
        from gaudi_batch.pipelines.base import Item

        items = [
            Item(int(row), 0, prompt, "", int(row)) for row, prompt in zip(batch["id"], batch["prompt"], strict=True)
        ]
        started = time.monotonic()
        generated = self.pipeline.generate(self.bucket, items)
        ended = time.monotonic()
        digests = list(self.pool.map(self._write, items, generated.images))
        line = {
            "card": self.card,
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "bucket": self.bucket._asdict(),
            "images": len(items),
            "generate_s": ended - started,
            "wait_s": started - self.idle_since,
        }
        self.idle_since = ended
        with self.lines.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        return {"id": batch["id"], "path": [f"{item.row:08d}.png" for item in items], "sha256": digests}

    def _write(self, item: Any, image: Any) -> str:
        from gaudi_batch.output.formats.encoding import encode, to_pixels

        data = encode(to_pixels(image), self.encoding)
        (self.images / f"{item.row:08d}.png").write_bytes(data)
        return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Runs the job on a cluster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--prompts", required=True, help="a Parquet file")
    parser.add_argument("--output", required=True)
    parser.add_argument("--cards", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-seconds", type=float, default=0.885)
    options = parser.parse_args()

    import pyarrow.parquet as pq
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.use_datasource_v2 = False
    # Ray Data needs pandas, and the product not to have it: it is on the path of this job's processes alone.
    path = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray.init(address=options.address, runtime_env={"env_vars": path}, log_to_driver=False)
    batches = -(-pq.read_metadata(options.prompts).num_rows // options.batch_size)
    pool = ActorPoolStrategy(size=options.cards, max_tasks_in_flight_per_actor=2, max_concurrent_calls_per_actor=2)
    made = ray.data.read_parquet(options.prompts, override_num_blocks=batches).map_batches(
        Painter,
        fn_constructor_args=(options.output, options.batch_seconds),
        batch_size=options.batch_size,
        batch_format="numpy",
        compute=pool,
        num_cpus=0,
        resources={"HPU": 1},
    )
    made.write_parquet(f"{options.output}/manifest", min_rows_per_file=ROWS_PER_FILE)


if __name__ == "__main__":
    main()
