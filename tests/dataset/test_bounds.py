"""What a row may ask for at most: beyond it the row fails with its reason. A run that began without goes on without."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Unfenced, read_manifest

from gaudi_batch import JobConfig
from gaudi_batch.cli import main as cli
from gaudi_batch.config.bounds import MAX_PROMPT, bounds_for
from gaudi_batch.dataset.rows import RowRules, make_row
from gaudi_batch.driver.opening import begin_run
from gaudi_batch.job import resolve
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.plan import Bucket
from gaudi_batch.storage.store import Storage

RULES = RowRules(Bucket(512, 512, 50, 7.5), 1, None, 8, bounds_for(512, 512))
ROWS: dict[str, Any] = {
    "id": ["a", "b", "a", "c", "d", "e"],
    "prompt": ["small", "wide", "long", "many steps", "odd guidance", "too many"],
    "width": [64, 8200, 64, 64, 64, 64],
    "height": [8, 8, 8200, 8, 8, 8],
    "steps": [2, 2, 2, 10**9, 2, 2],
    "guidance_scale": [1.0, 1.0, 1.0, 1.0, 1e300, 1.0],
    "num_images": [1, 1, 1, 1, 1, 10**9],
}
REASONS = {
    "wide": "width is 8200; it must be at most 8192, unless the job's max_pixels says otherwise",
    "long": "height is 8200; it must be at most 8192, unless the job's max_pixels says otherwise",
    "many steps": "steps is 1000000000; it must be at least 1 and at most 1000",
    "odd guidance": "guidance_scale is 1e+300; it must be at most 1000",
    "too many": "num_images is 1000000000; it must be at least 1 and at most 10000",
}


def a_job(prompts: Path, output: Path, **fields: Any) -> dict[str, Any]:
    return {
        "prompts": str(prompts),
        "output": str(output),
        "device": "simulated",
        "simulated": {"batch_seconds": 0.01},
        "batch_size": 2,
        "cards": 2,
        **fields,
    }


@pytest.fixture
def gaudi_batch(tmp_path: Path, cluster: str) -> Callable[..., int]:
    """Runs a command of the command line on a job file, in this process; returns its exit code."""

    def call(command: str, job: dict[str, Any], *flags: str) -> int:
        file = tmp_path / "job.yaml"
        file.write_text(json.dumps(job))
        return cli.main([command, str(file), *flags, *(["--address", cluster] if command == "run" else [])])

    return call


@pytest.mark.usefixtures("thread_cards")
def test_a_row_beyond_a_bound_fails_with_its_reason(
    write_prompts: Callable[..., Path], tmp_path: Path, gaudi_batch: Callable[..., int], capsys: Any
) -> None:
    prompts, output = write_prompts(ROWS), tmp_path / "out"
    assert gaudi_batch("check", a_job(prompts, output), "--strict") == 2
    assert "5 rows can't be run" in capsys.readouterr().err
    assert gaudi_batch("run", a_job(prompts, output)) == 3
    rows = {row["prompt"]: row for row in read_manifest(output)}
    assert {name: row["error"] for name, row in rows.items() if row["status"] == "failed"} == REASONS
    assert rows["small"]["status"] == "ok"
    shape = {name: [row[column] for column in ("width", "height", "steps")] for name, row in rows.items()}
    assert shape == {
        "small": [64, 8, 2],
        "wide": [None, 8, 2],
        "long": [64, None, 2],
        "many steps": [64, 8, None],
        "odd guidance": [64, 8, 2],
        "too many": [64, 8, 2],
    }
    assert [rows[name]["seed"] is None for name in rows] == [False] * 6
    assert "2 of 6 rows share an id with another row, such as 'a'. Rows of one id get" in capsys.readouterr().err
    assert json.loads((output / "summary.json").read_text())["rows_that_share_an_id"] == 2
    assert rows["small"]["seed"] == rows["long"]["seed"] != rows["wide"]["seed"]
    assert cli.main(["status", str(output), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["failed_rows"], status["rows"]) == (5, 6)

    # What the job says alone decides, and it is a part of what the run is.
    assert gaudi_batch("run", a_job(prompts, output, max_pixels=524_800)) == 2
    log = capsys.readouterr().err
    assert "max_pixels: was 4194304, is 524800" in log
    assert gaudi_batch("run", a_job(prompts, tmp_path / "wide", max_pixels=524_800)) == 3
    made = {row["prompt"]: row["status"] for row in read_manifest(tmp_path / "wide")}
    assert [name for name, status in made.items() if status == "ok"] == ["small", "wide", "long"]


def test_a_run_that_began_without_bounds_is_finished_without_them(
    write_prompts: Callable[..., Path], tmp_path: Path, gaudi_batch: Callable[..., int], capsys: Any
) -> None:
    small = {name: values[:3] for name, values in ROWS.items()}
    job = a_job(write_prompts(small), tmp_path / "out")
    begin_run(Ledger(Storage(job["output"]), Unfenced()), replace(resolve(JobConfig(**job)), bounds=None), 1)
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert not [name for name in record["fingerprint"] if name.startswith("max_")]
    assert gaudi_batch("run", job | {"max_pixels": 1_000_000}) == 2
    assert "max_pixels: was None, is 1000000" in capsys.readouterr().err
    assert gaudi_batch("run", job) == 0
    assert sorted((row["prompt"], row["width"], row["height"]) for row in read_manifest(tmp_path / "out")) == [
        ("long", 64, 8200),
        ("small", 64, 8),
        ("wide", 8200, 8),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 8200}, "the job's own width is 8200; it must be at most 8192"),
        ({"width": 4096, "height": 4096}, "width x height is 4096x4096, 16777216 pixels; it must be at most 4194304"),
        ({"width": 64, "height": 64, "max_pixels": 4095}, "64x64, 4096 pixels; it must be at most 4095"),
        ({"max_pixels": 8}, "unless the job's max_pixels says otherwise"),
        ({"steps": 1001}, "the job's own steps is 1001; it must be at least 1 and at most 1000"),
        ({"guidance_scale": 1e300}, "the job's own guidance_scale is 1e+300; it must be at most 1000"),
        (
            {"negative_prompt": "x" * (MAX_PROMPT + 1)},
            "negative_prompt has 65537 characters; it must have at most 65536",
        ),
    ],
)
def test_a_job_beyond_a_bound_is_refused_at_once(
    prompts: Path, tmp_path: Path, capsys: Any, fields: dict[str, Any], message: str
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(a_job(prompts, tmp_path / "out", **fields)))
    assert cli.main(["run", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_bound_on_pixels_follows_from_the_model_or_is_the_job_s_alone() -> None:
    assert (bounds_for(512, 512).max_pixels, bounds_for(512, 512).max_side) == (2048 * 2048, 8192)
    assert bounds_for(1536, 1024).max_pixels == 4 * 1536 * 1024
    assert (bounds_for(512, 512, 10**8).max_pixels, bounds_for(512, 512, 10**8).max_side) == (10**8, 10**8)


def test_a_prompt_that_no_model_reads_fails_its_row_and_is_kept_in_part() -> None:
    row = make_row(0, {"prompt": "x" * 10**6, "negative_prompt": "y"}, RULES)
    assert row.error == "prompt has 1000000 characters; it must have at most 65536, and no model reads as many"
    assert len(row.prompt) == MAX_PROMPT
    assert make_row(0, {"prompt": "x" * MAX_PROMPT}, RULES).error is None
    assert make_row(0, {"prompt": "x" * 10**6}, replace(RULES, bounds=None)).error is None
