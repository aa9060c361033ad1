"""The demo, checked by eye's stand-in: the judge reads each picture and compares it with its own prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers import command_line, files, read_manifest
from PIL import Image

from gaudi_batch import JobConfig
from gaudi_batch.cli.demo import COLUMNS, PROMPTS, demo
from gaudi_batch.cluster.connection import attached
from gaudi_batch.driver.result import RunResult
from gaudi_batch.errors import InputError
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> RunResult:
    """The demo with a part of its prompts, on cards that are processes."""
    with pytest.MonkeyPatch.context() as patched, attached(cluster):
        patched.setenv("RAY_ADDRESS", "nobody.invalid:6379")  # the demo is not sent there
        return demo(str(tmp_path_factory.mktemp("made") / "demo"), 30)


def test_each_picture_belongs_to_its_own_prompt(made: RunResult) -> None:
    assert made.exit_code == 0
    output = Path(made.output)
    rows = read_manifest(output)
    assert len(rows) == 30
    assert len(made.summary["cards"]) == 2
    right = sum(colours_seen(output / row["path"]) == (row["background"], row["colour"]) for row in rows)
    assert right >= 0.95 * len(rows)
    wanted = [Scene(row["background"], row["colour"], row["shape"], row["size"]) for row in rows]
    whole = sum(scene_seen(output / row["path"]) == scene for row, scene in zip(rows, wanted, strict=True))
    assert whole >= 0.9 * len(rows)
    sheet = Image.open(output / "contact_sheet.png")
    assert sheet.width > COLUMNS * 128
    assert sheet.height > 30 / COLUMNS * 128


def test_the_bundled_prompts_say_what_their_columns_say() -> None:
    rows = pq.read_table(PROMPTS).to_pylist()
    assert len(rows) == len({row["prompt"] for row in rows}) == 200
    for row in rows:
        assert all(row[name] in row["prompt"].split() for name in ("background", "colour", "shape", "size"))


def test_the_demo_removes_no_run_but_its_own(made: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "demo"
    shutil.copytree(made.output, output)
    (output / "notes.txt").write_text("mine")
    path = output / "run.json"
    own = json.loads(path.read_text())
    changes: list[dict[str, Any]] = [
        {"steps": 50},
        {"guidance_scale": 7.5},
        {"seed": 1},
        {"num_images": 2},
        {"device": "simulated"},
        {"cards": "all"},
        {"encoding": {"type": "jpeg", "quality": 95}},
        {"prompts": f"/home/me/{PROMPTS.name}"},
        {"prompts": 5},
        {"prompts": None},
    ]
    records = [own | {"job": own["job"] | change} for change in changes]
    for record in (*records, own | {"job": "x"}, own | {"job": None}, [own], {}, "x"):
        path.write_text(json.dumps(record))
        before = files(output)
        with pytest.raises(InputError, match="not the demo's"):
            demo(str(output), 2)
        assert files(output) == before
    refused = command_line("demo", "--output", output, "--prompts-count", "2")
    assert refused.returncode == 2
    assert "name another output with --output" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    path.unlink()
    with pytest.raises(InputError, match="not the demo's"):
        demo(str(output), 2)
    older = {name: value for name, value in own["job"].items() if name not in ("use_safetensors", "gaudi")}
    del older["limits"]["answer"]
    path.write_text(json.dumps(own | {"job": older}))
    begun: list[dict[str, Any]] = []

    def run(config: JobConfig, **flags: Any) -> RunResult:
        begun.append(flags)
        return made

    monkeypatch.setattr("gaudi_batch.cli.demo.run", run)
    assert demo(str(output), 2) is made
    assert begun == [{"address": "local", "overwrite": True}]
    assert (output / "notes.txt").exists()
