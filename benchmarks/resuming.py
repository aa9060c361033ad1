"""How long a run of hundreds of thousands of shards takes to resume and to end, on a disk and on a store far away.

    python -m benchmarks.resuming --shards 40000

`benchmarks/large_output.py` writes an output of which 99 % is committed. A command makes the rest on cards that do not
sleep: once on the local disk, once with the same directory served as S3, each request after 20 ms. The prompts are on
the disk in both.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.directory_s3 import BUCKET, bucket_served
from benchmarks.harness import (
    Batch,
    Sampler,
    parse_batch,
    process_kinds,
    ray_started,
    run_command,
    scratch,
    storage_flags,
)
from benchmarks.large_output import CARD, IMAGES, write
from benchmarks.report import Benchmark, Row
from gaudi_batch.layout import ROLLUPS, manifest_path, parse_attempt, parse_manifest
from gaudi_batch.output import rollup
from gaudi_batch.storage.store import Storage

SHARDS = 400_000
COMMITTED = 0.99
CARDS = 8
LATENCY_S = 0.02
LARGE = ("manifest", "images", "throughput")
"""The directories that have something of every shard."""
FLAGS = ("--simulated.batch-seconds", "0", "--shard-size", str(IMAGES))
MB = 1024**2


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Both cases."""
    shards = options.shards or SHARDS
    with scratch() as home:
        write(home / "run", shards, COMMITTED, quiet=True)
        output, records = home / "run/out", home / "records"
        committed = len(list((output / "manifest").iterdir()))
        shutil.copytree(output, records, ignore=shutil.ignore_patterns(*LARGE))
        case = f"{committed:,} shards of {round(committed / COMMITTED):,} committed"
        yield f"{case}, local disk", _resume(home, str(output), ())
        _restore(output, records, committed)
        with bucket_served(home / "run") as (server, options_of_store):
            _mark(Storage(f"s3://{BUCKET}/out", options_of_store))
            server.latency_s = LATENCY_S
            figures = _resume(home, f"s3://{BUCKET}/out", storage_flags(options_of_store))
        yield f"{case}, S3 with {LATENCY_S * 1000:.0f} ms", figures


def _resume(home: Path, output: str, flags: tuple[str, ...]) -> dict[str, float]:
    """Makes what is missing, and returns the figures."""
    with (
        ray_started(home, CARDS) as cluster,
        run_command(home / "run/prompts.parquet", output, cluster.address, *FLAGS, *flags) as command,
        Sampler(process_kinds(cluster, command)) as sampler,
    ):
        command.wait()
    batches = list(_new_batches(home / "run/out"))
    last_commit = max(path.stat().st_mtime for path in (home / "run/out/manifest").iterdir())
    return {
        "dispatch_s": min(batch.begun for batch in batches) - command.started,
        "end_s": command.ended - last_commit,
        "driver_mb": max(sample.rss.get("driver", 0) for sample in sampler.samples) / MB,
    }


def _new_batches(output: Path) -> Iterator[Batch]:
    """The batches of cards that the written output does not have."""
    for directory in (output / "throughput").iterdir():
        if directory.name != CARD:
            for path in directory.iterdir():
                yield from (parse_batch(json.loads(line)) for line in path.read_text().splitlines())


def _restore(output: Path, records: Path, committed: int) -> None:
    """Takes back all that a run has made of an output."""
    for path in output.iterdir():
        if path.is_dir() and path.name not in LARGE:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()
    shutil.copytree(records, output, dirs_exist_ok=True)
    for path in (output / "manifest").iterdir():
        if (parse_manifest(path.name) or 0) >= committed:
            path.unlink()
    for path in (output / "images").iterdir():
        if (parse_attempt(path.name) or (0, ""))[0] >= committed:
            shutil.rmtree(path)
    for path in (output / "throughput").iterdir():
        if path.name != CARD:
            shutil.rmtree(path)


def _mark(storage: Storage) -> None:
    """Has the roll-ups say what this store, and no disk, lists of the manifests."""
    listed = storage.entries("manifest")
    for name in rollup.index_names(storage.names(ROLLUPS)):
        commits, rows_bytes = rollup.decode_index(storage.get(rollup.index_path(name)) or b"")
        paths = (Path(manifest_path(commit.info.shard)).name for commit in commits)
        marked = [replace(commit, entry=listed[path]) for commit, path in zip(commits, paths, strict=True)]
        storage.put(rollup.index_path(name), rollup.encode_index(marked, rows_bytes))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --shards."""
    parser.add_argument("--shards", type=int, help=f"measure a plan of about so many (default: {SHARDS})")


COLUMNS = {
    "dispatch_s": ("from the command to the first batch, s", ".1f"),
    "end_s": ("from the last commit to the end, s", ".1f"),
    "driver_mb": ("driver's largest memory, MB", ".0f"),
}
BENCHMARK = Benchmark("resuming", __doc__, COLUMNS, measure, add_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
