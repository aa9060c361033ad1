"""Writes an output of many committed shards, as a run that was stopped near its end leaves it.

    python benchmarks/large_output.py /tmp/large --shards 400000 --committed 0.99

It has the prompts, run.json, the plan, the lease of a driver that has let go, a manifest for each committed shard, the
roll-ups that the run wrote on its way, and a throughput file and an image for each attempt. The images are empty, and
one a shard: neither resuming nor the end of a run reads them, and what is listed are their directories.

What goes on with it is `gaudi-batch run --prompts DIR/prompts.parquet --output DIR/out --device simulated --shard-size
16`.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gaudi_batch import JobConfig
from gaudi_batch.cluster.devices import with_device
from gaudi_batch.driver.opening import begin_run
from gaudi_batch.job import resolve
from gaudi_batch.layout import attempt_name, image_path, manifest_path, throughput_path
from gaudi_batch.output import manifest, rollup
from gaudi_batch.output.commits import ROLLUP_SHARDS
from gaudi_batch.output.holder import Lease
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import COLUMNS, CommitInfo
from gaudi_batch.output.rollup import Commit
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.plan import Shard
from gaudi_batch.storage.store import Storage

IMAGES = 16
"""Of a shard."""
BATCH = 8
CARD = "card-0"
WRITE_THREADS = 4


class Unfenced:
    """A holder of a lease that nobody else wants."""

    def ensure_held(self) -> None:
        """Always."""

    def holds(self) -> bool:
        """Always."""
        return True


def rows_of(shards: list[Shard]) -> pa.Table:
    """The rows of the manifests of some shards, one after the other."""
    rows = [row for shard in shards for row in range(shard.start, shard.stop)]
    numbers = [shard.number for shard in shards for _ in range(shard.rows)]
    count = len(rows)
    columns = {
        "id": [str(row) for row in rows],
        "row": rows,
        "image_index": [0] * count,
        "status": ["ok"] * count,
        "error": pa.nulls(count, pa.string()),
        "path": [f"images/{attempt_name(n, 'aaaaa1')}/{row:08d}-00.png" for n, row in zip(numbers, rows, strict=True)],
        "sha256": [f"{row:064x}" for row in rows],
        "seed": rows,
        "prompt": [f"a photo of object number {row} on a table" for row in rows],
        "negative_prompt": [""] * count,
        "width": [512] * count,
        "height": [512] * count,
        "steps": [50] * count,
        "guidance_scale": [7.5] * count,
        "nsfw": pa.nulls(count, pa.bool_()),
        "truncated": [False] * count,
        "shard": numbers,
        "card": [CARD] * count,
        "finished_at": [1_700_000_000_000_000 + row for row in rows],
    }
    return pa.table({name: pa.array(columns[name], COLUMNS.field(name).type) for name in COLUMNS.names})


def write(directory: Path, shards: int, committed: float, quiet: bool = False) -> None:
    """Writes all of it.

    Args:
        directory: where; it gets `prompts.parquet` and `out`.
        shards: about how many the plan has.
        committed: the part of them that is committed, 0 to 1.
        quiet: whether nothing is printed of how far it is.
    """
    directory.mkdir(parents=True)
    rows = shards * IMAGES
    prompts = directory / "prompts.parquet"
    with pq.ParquetWriter(prompts, pa.schema({"prompt": pa.string()})) as writer:
        for start in range(0, rows, 100_000):
            texts = [f"a photo of object number {row} on a table" for row in range(start, min(rows, start + 100_000))]
            writer.write_table(pa.table({"prompt": texts}))
    storage = Storage(str(directory / "out"))
    ledger = Ledger(storage, Unfenced())
    config = JobConfig(
        prompts=str(prompts), output=storage.place, device="simulated", batch_size=BATCH, shard_size=IMAGES, steps=50
    )
    job = resolve(with_device(config, None, None))
    info, plan = begin_run(ledger, job, 1)
    done = plan[: int(len(plan) * committed)]
    out = directory / "out"
    for place in ("manifest", "images", f"throughput/{CARD}"):
        (out / place).mkdir(parents=True, exist_ok=True)
    lease = Lease("aaaaa", "host", "machine", 1, "", 1, (), released=True)
    storage.put("lease.json", json.dumps(asdict(lease)).encode())
    line = json.dumps({"time": "", "card": CARD, "images": BATCH, "generate_s": 0.885}) + "\n"
    with ThreadPoolExecutor(WRITE_THREADS) as pool:
        for first in range(0, len(done), ROLLUP_SHARDS):
            part = done[first : first + ROLLUP_SHARDS]
            table = rows_of(part)

            def write_shard(shard: Shard, start: int, table: pa.Table = table) -> CommitInfo:
                images = shard.images
                sums = ThroughputTotals(-(-images // BATCH), images, 0, images, 0.11 * images, 0.0, 0.01, 0.3, 0.5)
                commit = CommitInfo(
                    shard.number, "aaaaa1", CARD, "node", 0, shard.rows, 0, shard.images, sums, info.run_id
                )
                commit = replace(commit, finished_at=1_700_000_000.0 + shard.number)
                own = table.slice(start, shard.rows)
                metadata = {manifest._METADATA_KEY: json.dumps(asdict(commit)).encode()}
                pq.write_table(
                    own.replace_schema_metadata(metadata), out / manifest_path(shard.number), compression="zstd"
                )
                image = out / image_path(shard.number, "aaaaa1", shard.start, 0, "png")
                image.parent.mkdir()
                image.touch()
                (out / throughput_path(CARD, shard.number, "aaaaa1")).write_text(2 * line)
                return commit

            starts = [0]
            for shard in part:
                starts.append(starts[-1] + shard.rows)
            infos = list(pool.map(write_shard, part, starts))
            if len(part) == ROLLUP_SHARDS:
                commits = [Commit(each, storage.entry(manifest_path(each.shard)), None) for each in infos]
                name = f"aaaaa{first // ROLLUP_SHARDS:06d}"
                ledger.put(rollup.rows_path(name), rollup.encode_rows(rollup.join_tables([table])))
                ledger.put(rollup.index_path(name), rollup.encode_index(commits, table.nbytes))
            if not quiet:
                print(f"{first + len(part)} of {len(done)} shards", flush=True)


def main() -> None:
    """Writes an output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shards", type=int, default=400_000)
    parser.add_argument("--committed", type=float, default=0.99)
    arguments = parser.parse_args()
    write(arguments.directory, arguments.shards, arguments.committed)


if __name__ == "__main__":
    main()
