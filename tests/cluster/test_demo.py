"""The demo, checked by eye's stand-in: the judge reads each picture and compares it with its own prompt."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers import read_manifest
from PIL import Image

from gaudi_batch.cli.demo import COLUMNS, PROMPTS, demo
from gaudi_batch.cluster.connection import attached
from tools.shapes.judge import NoVerdict, judge, judge_colours
from tools.shapes.pictures import Scene

pytestmark = pytest.mark.torch


def colours_seen(path: Path) -> tuple[str, str] | None:
    try:
        return judge_colours(Image.open(path))
    except NoVerdict:
        return None


def scene_seen(path: Path) -> Scene | None:
    try:
        return judge(Image.open(path))
    except NoVerdict:
        return None


def test_each_picture_belongs_to_its_own_prompt(tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nobody.invalid:6379")  # the demo is not sent there
    with attached(cluster):
        result = demo(str(tmp_path / "demo"), 200)
    assert result.exit_code == 0
    rows = read_manifest(tmp_path / "demo")
    assert len(rows) == 200
    assert len(result.summary["cards"]) == 2
    right = sum(colours_seen(tmp_path / "demo" / row["path"]) == (row["background"], row["colour"]) for row in rows)
    assert right >= 0.95 * len(rows)
    wanted = [Scene(row["background"], row["colour"], row["shape"], row["size"]) for row in rows]
    whole = sum(scene_seen(tmp_path / "demo" / row["path"]) == scene for row, scene in zip(rows, wanted, strict=True))
    assert whole >= 0.9 * len(rows)
    sheet = Image.open(tmp_path / "demo/contact_sheet.png")
    assert sheet.width > COLUMNS * 128
    assert sheet.height > 200 / COLUMNS * 128


def test_the_bundled_prompts_say_what_their_columns_say() -> None:
    rows = pq.read_table(PROMPTS).to_pylist()
    assert len(rows) == len({row["prompt"] for row in rows}) == 200
    for row in rows:
        assert all(row[name] in row["prompt"].split() for name in ("background", "colour", "shape", "size"))
