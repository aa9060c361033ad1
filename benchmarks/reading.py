"""How many bytes a job reads from the prompts' store, over the size of the files.

    python -m benchmarks.reading --cards 8 --prompts 2560

Files of four row groups each on an S3 server that counts what it sends. 1 would be each byte once. Where there are more
cards than row groups, several must read the same: with 64 cards and 32 groups 2 is the least. Batches take as long as
those of Stable Diffusion 2, and four times as long: of the short ones, 64 cards make more than two cores can store;
they then fall behind by chance, and help each other out more often.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.directory_s3 import BUCKET, bucket_served
from benchmarks.harness import BATCH_S, BATCH_SIZE, ray_started, run_command, scratch
from benchmarks.report import Benchmark, Row, size_flags

CARDS = 64
FILES = 8
GROUPS = 4
"""Row groups of a file."""
BATCHES = 40
"""Of each card."""
LONGER = (1, 4)
"""How many times as long as a batch of Stable Diffusion 2 each batch takes."""
WORDS = 80
"""Of a prompt, each of 3 to 9 random letters, which no compression makes much smaller."""


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """A job of each length of batches."""
    for longer in LONGER:
        yield _measure(options, BATCH_S * longer)


def _measure(options: argparse.Namespace, batch_s: float) -> Row:
    cards = options.cards or CARDS
    prompts = options.prompts or cards * BATCHES * BATCH_SIZE
    with scratch() as home:
        bucket = home / "store"
        (bucket / "prompts").mkdir(parents=True)
        _write(bucket / "prompts", prompts)
        stored = sum(path.stat().st_size for path in bucket.rglob("*.parquet"))
        with (
            bucket_served(bucket) as (server, store),
            ray_started(home, cards) as cluster,
            run_command(
                f"s3://{BUCKET}/prompts",
                home / "out",
                cluster.address,
                "--prompts-storage-options",
                json.dumps(store),
                "--simulated.batch-seconds",
                str(batch_s),
            ) as command,
        ):
            command.wait()
        read = sum(size for key, size in server.sent.items() if key.startswith("prompts/"))
    case = f"{prompts:,} prompts, {cards} cards, {FILES} files of {GROUPS} row groups, batches of {batch_s:.2f} s"
    return case, {"stored_mb": stored / 1e6, "read_mb": read / 1e6, "read_over_stored": read / stored}


def _write(directory: Path, prompts: int) -> None:
    letters = random.Random(0)
    rows = -(-prompts // FILES)
    for number in range(FILES):
        texts = [_text(letters) for _ in range(min(rows, prompts - number * rows))]
        table = pa.table({"prompt": texts, "topic": [text[:8] for text in texts]})
        pq.write_table(table, directory / f"part-{number}.parquet", row_group_size=-(-rows // GROUPS))


def _text(letters: random.Random) -> str:
    return " ".join(
        "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(3, 9))) for _ in range(WORDS)
    )


COLUMNS = {
    "stored_mb": ("size of the files, MB", ".1f"),
    "read_mb": ("bytes read, MB", ".1f"),
    "read_over_stored": ("read over size", ".2f"),
}
BENCHMARK = Benchmark("reading", __doc__, COLUMNS, measure, size_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
