"""The command line as a user meets it: exit codes, one clear line for what is wrong, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY, S3Server, called, command_line, read_manifest

from gaudi_batch.cli import commands
from gaudi_batch.cli.main import main
from gaudi_batch.errors import RunStopped

JOB = ("--device", "simulated", "--simulated.batch-seconds", "0.02", "--cards", "2")


def test_help_and_version_answer() -> None:
    assert "make every image of a job" in command_line("--help").stdout
    assert command_line("--version").stdout.strip()
    help_of_run = " ".join(command_line("run", "--help").stdout.split())
    assert "Seed of the run, from which rows without a seed get theirs. (default: 0)" in help_of_run


def test_the_last_line_for_machines_has_the_figures_of_a_run_that_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: argparse.Namespace) -> int:
        raise RunStopped("stopped: enough", {"state": "stopped", "images": 3, "cards": {}, "drivers": []})

    monkeypatch.setitem(cast(Any, commands.COMMANDS), "status", stopped)
    assert main(["status", "out", "--log-format", "json"]) == 1
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    del line["time"], line["logger"]
    assert line == {"level": "ERROR", "message": "stopped: enough", "state": "stopped", "images": 3}
    assert main(["status", "out"]) == 1
    assert capsys.readouterr().err.endswith(" stopped: enough\n")


@pytest.mark.ray
@pytest.mark.thorough
def test_code_that_a_job_brings_along_needs_no_installation(prompts: Path, tmp_path: Path) -> None:
    """Here with the packages that it depends on, and without its own."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for place in map(Path, (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        for entry in place.iterdir():
            if "gaudi_batch" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    command = [sys.executable, "-S", "jobs/text_to_image.py", "--config", str(tmp_path / "job.yaml"), *JOB]
    (tmp_path / "job.yaml").write_text(f"prompts: {prompts}\noutput: {tmp_path / 'out'}\n")
    environment = os.environ | {"PYTHONPATH": str(packages)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(read_manifest(tmp_path / "out")) == 100


@pytest.mark.parametrize("address", ["ray://head:10001", "http://user:xyzzy@head:8265"])
def test_an_address_of_another_kind_says_what_to_use(address: str, prompts: Path, tmp_path: Path) -> None:
    result = called("run", "--prompts", prompts, "--output", tmp_path / "out", *JOB, "--address", address)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "gaudi-batch submit --address http://head:8265" in line
    assert "xyzzy" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["gaudi_batch.cli.main", "gaudi_batch.reporting.status", "gaudi_batch.cli.flags"])
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('ray', 'torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--stepz", "3"], "unrecognized arguments: --stepz"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "required: COMMAND"),
        (["run", "--prompts", "nowhere", "--output", "OUT", *JOB], "nowhere': there is no such file"),
        (["run", "--prompts", "PROMPTS", "--output", "OUT", *JOB, "--width", "65"], "width is 65"),
        (["run", "--prompts", "PROMPTS", "--output", "OUT", *JOB, "--columns.prompt", "text"], "no column 'text'"),
        (["run", "--prompts", "PROMPTS", "--output", "OUT", "--model", "./none"], "'./none'"),
        (
            ["run", "--prompts", "PROMPTS", "--output", "OUT", "--model", "builtin:none"],
            "'builtin:none' is not built in",
        ),
        (["run", "--prompts", "PROMPTS", "--output", "OUT", *JOB, "--address", "127.0.0.1:1"], "'127.0.0.1:1'"),
        (["status", "OUT"], "there is no run here"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(prompts: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"PROMPTS": str(prompts), "OUT": str(tmp_path / "out")}
    # One of each kind in a process of its own, where a library could print something when it is imported.
    command = command_line if message in ("unrecognized arguments: --stepz", "width is 65") else called
    result = command(*(places.get(argument, argument) for argument in arguments))
    lines = [line for line in result.stderr.splitlines() if "Ray is" not in line]
    assert result.returncode == 2, result.stderr
    assert message in lines[-1]
    assert len(lines) == 1


def test_check_prints_the_plan_and_starts_nothing(write_prompts: Callable[..., Path], tmp_path: Path) -> None:
    prompts = write_prompts({"prompt": ["a", "", "c"] * 10, "width": [64, 64, 128] * 10, "mood": ["x"] * 30})
    result = called("check", "--prompts", prompts, "--output", tmp_path / "out", *JOB)
    assert result.returncode == 0
    assert "30 images in 5 shards and 5 batches of 8, padding 25.00%" in result.stdout
    assert "bucket   128x64, 50 steps, guidance 7.5: 10 rows, 10 images, 2 shards," in result.stdout
    assert "carried: mood" in result.stdout
    assert not (tmp_path / "out").exists()
    strict = called("check", "--strict", "--prompts", prompts, "--output", tmp_path / "out", *JOB)
    assert strict.returncode == 2
    assert "10 rows can't be run: row 1: prompt is empty" in strict.stderr


@pytest.mark.thorough
@pytest.mark.ray
def test_a_job_file_runs_on_a_ray_that_is_started_for_it_and_status_tells(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = tmp_path / "job.yaml"
    job.write_text(f"prompts: {prompts}/*.parquet\noutput: {output}\ndevice: simulated\ncards: 3\nshard_size: 8\n")
    result = command_line("run", job, "--simulated.batch-seconds", "0.5", "--simulated.raise-rows", "[3]")
    assert result.returncode == 3, result.stderr
    assert "complete with failed rows: 99 images, 1 failed row," in result.stdout
    assert f"images:   {output}/images" in result.stdout
    assert len(read_manifest(output)) == 100
    status = called("status", output)
    assert status.stdout.startswith(f"{output}: complete with failed rows\nimages   99 of 100 committed")
    told: dict[str, Any] = json.loads(called("status", output, "--json").stdout)
    assert told["summary"]["images"] == told["images_committed"] == 99
    assert told["failed_rows"] == 1


@pytest.mark.usefixtures("thread_cards")
def test_prompts_and_images_in_object_storage(prompts: Path, s3: S3Server, cluster: str) -> None:
    import s3fs

    filesystem = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True, use_listings_cache=False)
    filesystem.put(f"{prompts}/", "bucket/prompts/", recursive=True)
    options = ("--storage-options", json.dumps(s3.options))
    command = (
        *("run", "--prompts", "s3://bucket/prompts/*.parquet", "--output", "s3://bucket/runs/me@1", *options, *JOB),
        *("--shard-size", "16", "--address", cluster, "--encoding.type", "webp"),
    )
    result = called(*command)
    assert result.returncode == 0, result.stderr
    assert "images:   s3://bucket/runs/me@1/images\n" in result.stdout
    with filesystem.open("bucket/runs/me@1/manifest.parquet") as file:
        rows = pq.read_table(file).to_pylist()
    stored = {name.removeprefix("bucket/runs/me@1/") for name in filesystem.find("bucket/runs/me@1/images")}
    assert stored == {row["path"] for row in rows} | {"images/metadata.parquet"}
    assert len(rows) == 100
    written = [filesystem.cat_file(name) for name in filesystem.find("bucket/runs/me@1") if name.endswith("json")]
    assert not any(s3.options["secret"].encode() in data for data in written)
    assert s3.options["secret"] not in result.stderr + result.stdout
    assert "complete" in called("status", "s3://bucket/runs/me@1", *options).stdout
    assert called(*command, "--overwrite").returncode == 0
