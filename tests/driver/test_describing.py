"""Whoever opens the images of a run that goes on finds those that are committed, and no other."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Unfenced, wait_until
from outside import opened
from PIL import Image
from records import BUCKET, failed_manifest

from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.driver.describing import Description
from gaudi_batch.layout import IMAGES, METADATA, image_path
from gaudi_batch.output import manifest
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.joined import put_description
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo, ImageInfo, StoredImage
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.storage.store import Storage


def a_run(output: Path) -> Any:
    ledger = Ledger(Storage(str(output)), Unfenced())
    commits = Commits(ledger, "aaaaa")
    commits.refresh()
    return SimpleNamespace(ledger=ledger, commits=commits, latest_shard_of_row={})


def store(output: Path, shard: int) -> tuple[str, str]:
    """Stores an image as a card does, in a shard of its own; returns its path and the digest of its pixels."""
    path = image_path(shard, f"aaaaa{shard}", shard, 0, "png")
    (output / path).parent.mkdir(parents=True)
    image = Image.new("RGB", (16, 16), (shard, 0, 0))
    image.save(output / path)
    return path, hashlib.sha256(image.tobytes()).hexdigest()


def commit(output: Path, shard: int, path: str) -> None:
    info = CommitInfo(shard, f"aaaaa{shard}", "n-0", "n", 0, 1, 0, 1, ThroughputTotals())
    row = PromptRow(shard, f"r{shard}", "p", "", None, BUCKET, 1, None)
    image = ImageInfo(StoredImage(path, "0" * 64, datetime.now(timezone.utc), 0.0, 0.0), 0, None, False)
    data = manifest.build([row], pa.table({"topic": ["t"]}), {(shard, 0): image}, {}, 0, info)
    Storage(str(output)).put(f"manifest/{shard:06d}.parquet", data)


def test_before_the_first_commit_a_loader_finds_no_image(tmp_path: Path) -> None:
    """It says so. A run that an older version began may have commits and no description."""
    output = tmp_path / "out"
    Description(a_run(output)).close(wait=True)
    places = [store(output, shard) for shard in range(2)]
    with pytest.raises(AssertionError, match="corresponds to no data"):
        opened("imagefolder", str(output / IMAGES), tmp_path)
    commit(output, 0, places[0][0])
    (output / IMAGES / METADATA).unlink()
    description = Description(a_run(output))
    wait_until(lambda: pq.read_metadata(output / IMAGES / METADATA).num_rows)
    description.close(wait=True)
    assert opened("imagefolder", str(output / IMAGES), tmp_path) == {"imagefolder": [(0, "p", places[0][1])]}


def test_a_loader_finds_images_after_a_shard_whose_rows_all_failed(tmp_path: Path) -> None:
    output = tmp_path / "out"
    Storage(str(output)).put("manifest/000000.parquet", failed_manifest(0, {0: "boom"}))
    path, digest = store(output, 1)
    commit(output, 1, path)
    put_description(a_run(output).commits, {})
    assert opened("imagefolder", str(output / IMAGES), tmp_path) == {"imagefolder": [(1, "p", digest)]}
