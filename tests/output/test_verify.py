"""Every image that a manifest names is read back; what is missing, torn or foreign is named."""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import Unfenced
from records import BUCKET

from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.output import manifest
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo, ImageInfo, StoredImage
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.output.verify import VerifyReport, foreign_attempts, verify
from gaudi_batch.storage.store import Storage


def commit(ledger: Ledger, shard: int, rows: list[int], again: bool = False) -> None:
    """Stores an image a row and commits them."""
    attempt, images = f"aaaaa{shard}", {}
    for row in rows:
        path, data = f"images/{shard:06d}-{attempt}/{row:08d}-00.png", f"image {row} of {shard}".encode()
        ledger.storage.put(path, data)
        stored = StoredImage(path, hashlib.sha256(data).hexdigest(), datetime.now(timezone.utc), 0.0, 0.0)
        images[row, 0] = ImageInfo(stored, row, None, False)
    prompts = [PromptRow(row, str(row), "p", "", None, BUCKET, 1, None) for row in rows]
    info = CommitInfo(shard, attempt, "c", "n", None, len(rows), 0, len(rows), ThroughputTotals(), again=again)
    carried = pa.table({"topic": ["t"] * len(rows)})
    assert ledger.commit(info, manifest.build(prompts, carried, images, {}, 0, info))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Two shards of four rows, each with an image."""
    made = Ledger(Storage(str(tmp_path / "out")), Unfenced())
    commit(made, 0, [0, 1, 2, 3])
    commit(made, 1, [4, 5, 6, 7])
    return made


def verified(ledger: Ledger, latest: dict[int, int]) -> VerifyReport:
    report = verify(ledger, ledger.manifests(), latest)
    report.foreign += foreign_attempts(ledger, [info for info, _ in ledger.commits()])
    return report


def test_an_output_that_is_whole_has_nothing_to_name(ledger: Ledger) -> None:
    report = verified(ledger, {})
    assert report.lines() == ["verified 8 images: 0 missing, 0 torn, 0 foreign"]
    assert not report.broken


def test_what_is_missing_torn_and_foreign_is_named_with_its_rows(ledger: Ledger) -> None:
    output = ledger.storage
    output.remove("images/000000-aaaaa0/00000001-00.png")
    output.put("images/000001-aaaaa1/00000006-00.png", b"im")
    output.put("images/000001-aaaaa1/notes.txt", b"x")
    output.put("images/000009-bbbbb1/00000000-00.png", b"x")
    report = verified(ledger, {})
    assert report.missing == ["images/000000-aaaaa0/00000001-00.png"]
    assert report.torn == ["images/000001-aaaaa1/00000006-00.png"]
    assert report.foreign == ["images/000001-aaaaa1/notes.txt", "images/000009-bbbbb1"]
    assert report.broken == {1: 0, 6: 1}
    assert report.describe()["broken"] == [1, 6]


def test_of_a_row_that_was_made_again_the_last_shard_alone_is_read(ledger: Ledger) -> None:
    ledger.storage.remove("images/000000-aaaaa0/00000001-00.png")
    commit(ledger, 2, [1], again=True)
    assert not verified(ledger, {1: 2}).broken
