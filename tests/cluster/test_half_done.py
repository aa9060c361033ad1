"""Outputs that an older version began and did not finish: what they hold counts, and the rest comes out the same."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TESTS, read_manifest
from PIL import Image

from gaudi_batch import JobConfig, run

KEPT = TESTS / "data/half_done"
CHANGED = 1_700_000_000
"""When its prompts were last changed, by run.json."""
MADE_BY = ("2.13.0+cpu", "AMD EPYC, AVX512")
"""The torch and the CPU that made the images of the one on the CPU."""


def finish(kept: Path, home: Path, cluster: str) -> tuple[Path, int]:
    """Copies a half-done output and its prompts, runs its job to the end, and returns its place and the exit code."""
    shutil.copytree(kept, home)
    os.utime(home / "prompts/part-0.parquet", (CHANGED, CHANGED))
    places = {"prompts": str(home / "prompts"), "output": str(home / "output"), "cards": 1}
    return home / "output", run(JobConfig.load(home / "job.yaml", places), address=cluster).exit_code


def rows_and_expected(kept: Path, output: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The manifest in order, as far as it is expected to say something, and what it should say."""
    expected = [json.loads(line) for line in (kept / "expected.jsonl").read_text().splitlines()]
    rows = sorted(read_manifest(output), key=lambda row: (row["row"], row["image_index"] or 0))
    return [{name: row[name] for name in expected[0]} for row in rows], expected


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def check_records(rows: list[dict[str, Any]], expected: list[dict[str, Any]], output: Path) -> None:
    """Images lie where they should, whole, and nothing else does; what was committed is where it was."""
    for row, end in zip(rows, expected, strict=True):
        assert row["path"] == end["path"] or fnmatch.fnmatch(row["path"], end["path"])
        if row["path"] is not None:
            assert hashlib.sha256((output / row["path"]).read_bytes()).hexdigest() == row["sha256"]
    stored = {str(path.relative_to(output)) for path in (output / "images").rglob("*.png")}
    assert stored == {row["path"] for row in rows} - {None}


@pytest.mark.usefixtures("thread_cards")
def test_a_run_of_an_older_version_is_finished_to_the_same_bytes(tmp_path: Path, cluster: str) -> None:
    kept = KEPT / "simulated"
    output, code = finish(kept, tmp_path / "run", cluster)
    rows, expected = rows_and_expected(kept, output)
    assert code == 3
    assert without(rows, "path") == without(expected, "path")
    check_records(rows, expected, output)
    assert json.loads((output / "summary.json").read_text())["images"] == 42


@pytest.mark.torch
@pytest.mark.usefixtures("thread_cards")
def test_a_run_on_the_cpu_of_an_older_version_is_finished_to_the_same_images(tmp_path: Path, cluster: str) -> None:
    kept = KEPT / "cpu"
    output, code = finish(kept, tmp_path / "run", cluster)
    rows, expected = rows_and_expected(kept, output)
    assert code == 0
    assert without(rows, "path", "sha256") == without(expected, "path", "sha256")
    check_records(rows, expected, output)
    for row in rows:
        made = np.asarray(Image.open(output / row["path"]), dtype=int)
        then = np.asarray(Image.open(kept / "images" / Path(row["path"]).name), dtype=int)
        assert abs(made - then).max() <= 2  # another CPU or torch rounds otherwise
    unknown, stack = json.loads((output / "run.json").read_text())["stacks"]
    assert unknown == {}
    if (stack["torch"], stack["device"]) == MADE_BY:
        assert without(rows, "path") == without(expected, "path")
