"""How large the report of a run is, how long it takes to make, and how long a browser takes to draw it.

    python -m benchmarks.report_page --images 100000

The run is written and not made: manifests, throughput lines, timelines and roll-ups as its driver leaves them, and of
each shard one image of 512 x 512, like a photo in what it weighs. Its shards have 250 images on 64 cards; a last case
has shards of 16, too many to read their throughput lines. `gaudi-batch report` makes the page, and Chromium opens it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.harness import scratch
from benchmarks.large_output import Unfenced
from benchmarks.report import Benchmark, Row
from gaudi_batch import JobConfig
from gaudi_batch.cluster.devices import with_device
from gaudi_batch.driver.opening import begin_run
from gaudi_batch.job import resolve
from gaudi_batch.layout import image_path, manifest_path, throughput_path
from gaudi_batch.output import manifest, rollup
from gaudi_batch.output.commits import ROLLUP_SHARDS
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import COLUMNS, CommitInfo
from gaudi_batch.output.rollup import Commit
from gaudi_batch.output.spans import Span
from gaudi_batch.output.throughput import BatchLine, ThroughputTotals
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.plan import Shard
from gaudi_batch.storage.store import Storage

IMAGES, CARDS, BATCH, BATCH_S = 1_000_000, 64, 8, 0.885
SHARD_SIZES = (250, 16)
ATTEMPT = "aaaaa1"
BEGAN = 1_700_000_000.0
PICTURES = 64
"""Different images."""
MB = 1024**2


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Both sizes of shards."""
    images = options.images or IMAGES
    for size in SHARD_SIZES:
        with scratch() as home:
            shards = write(home, images, size)
            page = home / "report.html"
            began = time.monotonic()
            command = [sys.executable, "-m", "gaudi_batch", "report", str(home / "out"), "--to", str(page)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            made_s = time.monotonic() - began
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            drawn_s, pictures = drawn(page)
            figures = {"made_s": made_s, "mb": page.stat().st_size / 1e6, "peak_mb": peak, "drawn_s": drawn_s}
            yield f"{images:,} images, {shards:,} shards, {CARDS} cards", {**figures, "pictures": pictures}


def write(home: Path, images: int, size: int) -> int:
    """Writes the output of a run; returns how many shards it has."""
    prompts = home / "prompts.parquet"
    pq.write_table(
        pa.table({"prompt": [f"a photo of object number {row} on a table" for row in range(images)]}), prompts
    )
    storage = Storage(str(home / "out"))
    ledger = Ledger(storage, Unfenced())
    config = JobConfig(
        prompts=str(prompts), output=storage.place, device="simulated", batch_size=BATCH, shard_size=size, steps=50
    )
    info, plan = begin_run(ledger, resolve(with_device(config, None, None)), 1)
    files = photos(home)
    timeline = Timeline(ledger, ATTEMPT[:5])
    timeline.begin()
    now = datetime.now(timezone.utc).timestamp()
    for card in range(CARDS):
        timeline.note(card, "", "starting", ago_s=now - BEGAN)
        timeline.note(card, f"node-{card // 8}-{card % 8}", "ready", ago_s=now - BEGAN - 60, load_s=60.0)
        if card % 16 == 3:
            timeline.note(card, f"node-{card // 8}-{card % 8}", "fault", ago_s=now - BEGAN - 5000, error="it hung")
    timeline.write()
    ends = dict.fromkeys(range(CARDS), BEGAN + 60)
    commits, tables = [], []
    for shard in plan:
        card = shard.number % CARDS
        commit, table, ends[card] = _write_shard(home / "out", shard, card, ends[card], info.run_id, files)
        commits.append(Commit(commit, storage.entry(manifest_path(shard.number)), None))
        tables.append(table)
        if len(commits) == ROLLUP_SHARDS:
            name = f"aaaaa{shard.number:06d}"
            storage.put(rollup.rows_path(name), rollup.encode_rows(rollup.join_tables(tables)))
            storage.put(rollup.index_path(name), rollup.encode_index(commits, 1))
            commits, tables = [], []
    wall_s = max(ends.values()) - BEGAN
    began, ended = (datetime.fromtimestamp(at, timezone.utc).isoformat() for at in (BEGAN, BEGAN + wall_s))
    span = Span(ATTEMPT[:5], began, ended, wall_s, wall_s * CARDS)
    summary = {"state": "complete", "rows_planned": images, "drivers": [asdict(span)]}
    storage.put("summary.json", json.dumps(summary).encode())
    return len(plan)


def _write_shard(
    out: Path, shard: Shard, number: int, start: float, run: str, files: list[Path]
) -> tuple[CommitInfo, pa.Table, float]:
    card, node = f"node-{number // 8}-{number % 8}", f"node-{number // 8}"
    seconds = BATCH_S * (1.6 if number == 11 else 1.0)
    lines = []
    for batch in range(-(-shard.images // BATCH)):
        images = min(BATCH, shard.images - batch * BATCH)
        began = datetime.fromtimestamp(start, timezone.utc).isoformat(timespec="milliseconds")
        figures = (images, BATCH - images, seconds, images / seconds, 0.002, 0.3, 0.5)
        place = ("", card, node, number % 8, "simulated", shard.number, batch, shard.bucket._asdict())
        lines.append(BatchLine(*place, "steady", *figures, started_at=began))
        start += seconds + 0.002
    sums = ThroughputTotals.of(lines)
    commit = CommitInfo(
        shard.number, ATTEMPT, card, node, number % 8, shard.rows, 0, shard.images, sums, run, finished_at=start
    )
    rows = list(range(shard.start, shard.stop))
    paths = [image_path(shard.number, ATTEMPT, row, 0, "png") for row in rows]
    columns = {
        "id": list(map(str, rows)),
        "row": rows,
        "status": ["ok"] * len(rows),
        "path": paths,
        "seed": rows,
        "prompt": [f"a photo of object number {row} on a table" for row in rows],
        "shard": [shard.number] * len(rows),
        "card": [card] * len(rows),
    }
    constant = {"image_index": 0, "width": 512, "height": 512, "steps": 50, "guidance_scale": 7.5, "truncated": False}
    columns |= {name: [value] * len(rows) for name, value in constant.items()}
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(rows), field.type)
        for field in COLUMNS
    ]
    table = pa.table(arrays, schema=COLUMNS)
    for path, data in (
        (manifest_path(shard.number), manifest.encode(table, commit)),
        (throughput_path(card, shard.number, ATTEMPT), "".join(f"{line.json()}\n" for line in lines).encode()),
    ):
        target = out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    (out / paths[0]).parent.mkdir(parents=True)
    os.link(files[shard.number % len(files)], out / paths[0])
    return commit, table, start


def photos(home: Path) -> list[Path]:
    """PNG files that weigh like photos: large soft shapes and some grain."""
    files = []
    for seed in range(PICTURES):
        random = np.random.default_rng(seed)
        shapes = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).resize(
            (512, 512), Image.Resampling.BICUBIC
        )
        grain = random.normal(0, 6, (512, 512, 3))
        pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
        files.append(home / f"photo-{seed}.png")
        Image.fromarray(pixels).save(files[-1], compress_level=1)
    return files


def drawn(page: Path) -> tuple[float, int]:
    """Seconds until Chromium has drawn a page, and how many pictures it has."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from browser import opened_browser

    os.environ["CI"] = "1"
    with opened_browser() as browser:
        began = time.monotonic()
        opened = browser.open(page)
        return time.monotonic() - began, int(opened.evaluate("data.pictures.length"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --images."""
    parser.add_argument("--images", type=int, help=f"images of the run (default: {IMAGES})")


COLUMNS_OF_TABLE = {
    "made_s": ("to make, s", ".1f"),
    "mb": ("size, MB", ".1f"),
    "peak_mb": ("largest memory, MB", ".0f"),
    "drawn_s": ("to open and draw, s", ".1f"),
    "pictures": ("pictures", ".0f"),
}
BENCHMARK = Benchmark("report_page", __doc__, COLUMNS_OF_TABLE, measure, add_flags)

if __name__ == "__main__":
    BENCHMARK.alone()
