"""How long libraries take to load 10,000 images of each format, and how large these are, from a disk and from S3.

    python -m benchmarks.loading --prompts 500

The images are of simulated cards, 256 x 256 pixels of one colour, so a file has less than a kilobyte and what is
measured is what objects and requests cost, and decoding. Each library decodes every image. `files` and `webdataset` are
what runs leave; `export` is a Parquet file that `gaudi-batch export` has packed of the files. `datasets` opens image
folders of a disk and of the hub, and none of S3.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ray_started, run_command, s3_server, scratch, storage_flags, write_prompts
from benchmarks.report import REPOSITORY, Benchmark, Row, size_flags
from gaudi_batch.storage.store import Storage

CARDS, PROMPTS = 8, 10_000
LOADERS = Path(sys.prefix) / "loaders"
JOB = ("--simulated.batch-seconds", "0", "--width", "256", "--height", "256")
SETS = {
    "files": ("images", "imagefolder"),
    "webdataset": ("data/*.tar", "webdataset,wds"),
    "parquet": ("data/*.parquet", "parquet,duckdb,pandas,polars"),
    "export": ("data/*.parquet", "parquet,duckdb,pandas,polars"),
}
"""Of each set, what to open and by which ways of tests/loaders/open_set.py."""
CALLED = {"imagefolder": "datasets", "webdataset": "datasets", "parquet": "datasets", "wds": "webdataset"}
"""The libraries of ways that have other names."""


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The figures of each set, place and library."""
    prompts = options.prompts or PROMPTS
    with scratch() as home, s3_server(home) as server, ray_started(home, options.cards or CARDS) as cluster:
        path = write_prompts(home / "prompts.parquet", prompts)
        for where, root, store in (("disk", str(home), {}), ("S3", server.url("sets"), server.options)):
            for name, (pattern, ways) in SETS.items():
                ways = "" if store and name == "files" else ways
                output = f"{root}/{name}"
                if name == "export":
                    export(f"{root}/files", output, store)
                else:
                    flags = [*JOB, "--format", name, *(storage_flags(store) if store else ())]
                    with run_command(path, output, cluster.address, *flags) as command:
                        command.wait()
                storage = Storage(output, store)
                stored = sizes(storage, pattern.partition("/")[0])
                for way, seconds in loaded(ways, f"{output}/{pattern}", store, home).items() if ways else ():
                    library = CALLED.get(way, way)
                    figures = {"load_s": seconds, "images_per_s": prompts / seconds}
                    yield f"{name}, {where}, {library}", {**figures, "objects": len(stored), "mb": sum(stored) / 1e6}


def export(output: str, target: str, store: dict[str, Any]) -> None:
    """Exports as people do who set nothing."""
    flags = ["--storage-options", json.dumps(store)] if store else []
    subprocess.run([sys.executable, "-m", "gaudi_batch", "export", output, target, *flags], check=True)


def sizes(storage: Storage, directory: str) -> list[int]:
    """The bytes of each object."""
    infos = storage.filesystem.find(storage.full(directory), detail=True)
    return [int(info["size"]) for info in infos.values()]


def loaded(ways: str, place: str, store: dict[str, Any], home: Path) -> dict[str, float]:
    """Seconds by way, each with nothing kept from another."""
    variables = os.environ | {"PYTHONPATH": str(LOADERS), "HF_HOME": str(home / "hf"), "HOME": str(home)}
    script = REPOSITORY / "tests/loaders/open_set.py"
    python = getattr(sys, "_base_executable", sys.executable)
    command = [python, str(script), ways, place, json.dumps(store)]
    printed = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
    answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {answer["way"]: answer["seconds"] for answer in answers}


COLUMNS = {
    "load_s": ("to load all, s", ".1f"),
    "images_per_s": ("images/s", ".0f"),
    "objects": ("objects", ".0f"),
    "mb": ("MB", ".1f"),
}
BENCHMARK = Benchmark("loading", __doc__, COLUMNS, measure, size_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
