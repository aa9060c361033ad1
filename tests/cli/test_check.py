"""`check` reads the rows and looks at the output; a file in an output's place is said in one line by every command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import S3Server, called, command_line, examples, read_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from smalljob import write_dataset

from gaudi_batch.cli import main as cli
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.survey import survey
from gaudi_batch.job import resolve

JOB = ("--device", "simulated", "--cards", "2", "--simulated.batch-seconds", "0.02")


def check(capsys: pytest.CaptureFixture[str], prompts: Path | str, output: Path | str, *flags: str) -> tuple[int, str]:
    """Runs `check`; returns its exit code and all that it printed."""
    code = cli.main(["check", "--prompts", str(prompts), "--output", str(output), *JOB, *flags])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def tree(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


# -- rows -------------------------------------------------------------------------------------------------------


def test_a_job_none_of_whose_rows_can_be_run_is_refused(
    write_prompts: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts({"prompt": ["a", "b"], "width": ["512", "wide"]})
    code, printed = check(capsys, prompts, tmp_path / "out")
    assert code == 2
    assert "rows     0 can be run, 2 can't" in printed
    assert (
        "bad      2 rows: width is '512'; it must be a whole number (others differ in the values) (id 0, 1)" in printed
    )
    assert re.search(r"no row can be run: row 0: width is '512'; it must be a whole number; row 1: ", printed)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("thread_cards")
def test_rows_that_can_t_be_run_are_those_that_fail(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    """Of every column that means something, held against the manifest of the run."""
    seeds = pa.array([None, 1, None, -1, 2, 3, 4, 5], pa.int64())
    prompts = write_prompts(
        {
            "prompt": ["a", " \x1f\u3000", "…", "b", "c", None, "d", "e"],
            "id": list("abcdefgh"),
            "seed": seeds,
            "width": [64, 64, 64, 64, 65, 64, 64, 64],
            "guidance_scale": [1.0, 1, 1, 1, 1, 1, float("nan"), 1],
        },
        row_group_size=3,
    )
    job = ("--prompts", prompts, "--output", tmp_path / "out", *JOB)
    checked = called("check", *job)
    assert checked.returncode == 0, checked.stderr
    assert called("run", *job, "--address", cluster).returncode == 3
    failed = [row for row in read_manifest(tmp_path / "out") if row["status"] == "failed"]
    assert f"rows     {8 - len(failed)} can be run, {len(failed)} can't" in checked.stdout
    assert len(failed) == 5
    for row in failed:
        assert f"row {row['row']}: {row['error']}" in checked.stdout
    assert command_line("check", *job, "--strict").returncode == 2


WILD: dict[str, Any] = {
    "prompt": st.none() | st.sampled_from(["a", "", " ", "\x1c", "\u2028", "…", "日本"]),
    "negative_prompt": st.none() | st.sampled_from(["", "x"]),
    "id": st.none() | st.integers(-3, 3),
    "width": st.none() | st.sampled_from([0, 64, 65, 128]),
    "steps": st.none() | st.sampled_from(["5", "five"]),
    "guidance_scale": st.none() | st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 7.5]),
    "num_images": st.none() | st.sampled_from([0.0, 1.0, 1.5, 20000.0]),
}
SEEDS: dict[pa.DataType, Any] = {
    pa.int64(): st.none() | st.sampled_from([-1, 0, 2**63 - 1]),
    pa.uint64(): st.none() | st.sampled_from([0, 2**63 - 1, 2**63, 2**64 - 1]),
    pa.float64(): st.none() | st.sampled_from([-1.0, -0.0, 0.5, 2.0**53, 2.0**63, float("nan"), float("inf")]),
    pa.string(): st.none() | st.just("1"),
}


@settings(max_examples=examples(40))
@given(st.data())
def test_arrow_passes_over_no_row_that_a_card_would_not_run(tmp_path: Path, data: st.DataObject) -> None:
    names = ["prompt", *data.draw(st.lists(st.sampled_from(sorted(WILD.keys() - {"prompt"} | {"seed"})), unique=True))]
    count = data.draw(st.integers(1, 12))
    kinds = {"prompt": pa.string(), "seed": data.draw(st.sampled_from(sorted(SEEDS, key=str)))}
    wild = WILD | {"seed": SEEDS[kinds["seed"]]}
    values = {name: data.draw(st.lists(wild[name], min_size=count, max_size=count)) for name in names}
    table = pa.table({name: pa.array(column, kinds.get(name)) for name, column in values.items()})
    kind = data.draw(st.sampled_from([pa.string(), pa.large_string(), pa.string_view(), "dictionary"]))
    prompts = table.column("prompt")
    table = table.set_column(0, "prompt", prompts.dictionary_encode() if kind == "dictionary" else prompts.cast(kind))
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=5)
    config = JobConfig(prompts=str(tmp_path / "p.parquet"), output=str(tmp_path / "out"), device="simulated")
    job = resolve(config)
    rows = [row for shard in job.plan(1) for row in job.dataset.read(shard, job.rules)[0]]
    bad = {(row.row, row.error) for row in rows if row.error is not None}
    survey_result = survey(job.dataset, job.rules, None)
    assert (survey_result.rows, survey_result.bad) == (count, len(bad))
    assert survey_result.first == sorted(bad)[:5]


def test_text_that_is_no_text_and_groups_that_can_t_be_decoded_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffz")]
    )
    path = tmp_path / "p.parquet"
    pq.write_table(
        pa.table({"prompt": pa.concat_arrays([broken, pa.array(["b" * 300] * 20)])}),
        path,
        row_group_size=10,
        compression="none",
        use_dictionary=False,
        data_page_version="1.0",
    )
    _, printed = check(capsys, path, tmp_path / "out")
    assert "rows     21 can be run, 1 can't" in printed
    assert "first of them: row 1: prompt can't be read as text" in printed
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    data[place : place + 8] = b"\xff" * 8
    path.write_bytes(data)
    code, printed = check(capsys, path, tmp_path / "out")
    assert code == 0
    assert re.search(r"bad .* row group 2 of 'p.parquet' can't be decoded", printed)


def test_check_says_how_many_ids_repeat_and_stays_within_the_limit(
    write_prompts: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_prompts({"prompt": ["a", "b", "c", ""], "id": ["x", "x", "y", "z"]})
    code, printed = check(capsys, prompts, tmp_path / "out")
    assert code == 0
    assert "ids      2 of 4 rows share an id with another row, such as 'x'" in printed
    _, printed = check(capsys, prompts, tmp_path / "out", "--limit", "1")
    assert "ids " not in printed
    assert "rows     1 can be run, 0 can't" in printed


# -- the output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/some/where"])
@pytest.mark.parametrize("command", ["run", "check", "status"])
def test_a_file_in_the_place_of_the_output_is_one_line_and_exit_2(
    command: str, below: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    place = f"{tmp_path}/out{below}"
    job = [place] if command == "status" else ["--prompts", str(prompts), "--output", place, *JOB]
    assert cli.main([command, *job]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"output '{place}': '{tmp_path}/out' is a file; an output is a directory, name another" in line
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("command", ["run", "check", "status"])
def test_an_object_in_the_place_of_the_output_too(
    command: str, s3: S3Server, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("s3", **s3.options, skip_instance_cache=True).pipe_file("bucket/in-the-way", b"mine")
    place, options = "s3://bucket/in-the-way", ["--storage-options", json.dumps(s3.options)]
    job = [place] if command == "status" else ["--prompts", str(prompts), "--output", place, *JOB]
    assert cli.main([command, *job, *options]) == 2
    # Lines before it may say that the server was slow.
    *_, line = capsys.readouterr().err.splitlines()
    assert f"output '{place}': '{place}' is a file" in line


@pytest.mark.parametrize("place", ["/proc/out", "/proc/some/where/out"])
def test_an_output_that_can_t_be_written_is_found_out(
    place: str, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = check(capsys, prompts, place)
    assert code == 2
    assert f"output '{place}' can't be written: " in printed


def test_what_check_tries_leaves_nothing_behind(
    prompts: Path, tmp_path: Path, s3: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    before = tree(tmp_path)
    for output in (tmp_path / "out", tmp_path / "new/place"):
        code, printed = check(capsys, prompts, output)
        assert code == 0
        assert "place    can be written; no run is there" in printed
    assert tree(tmp_path) == before
    filesystem = fsspec.filesystem("s3", **s3.options, skip_instance_cache=True, use_listings_cache=False)
    filesystem.pipe_file("bucket/checked/mine", b"mine")
    options = ("--storage-options", json.dumps(s3.options))
    code, printed = check(capsys, prompts, "s3://bucket/checked", *options)
    assert code == 0, printed
    assert filesystem.find("bucket/checked") == ["bucket/checked/mine"]
    code, printed = check(capsys, prompts, "s3://no-such-bucket/out", *options)
    assert code == 2
    assert "output 's3://no-such-bucket/out' can't be written: " in printed


@pytest.mark.usefixtures("thread_cards")
def test_a_run_that_is_there_is_described_and_another_job_refused(
    tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output, prompts = tmp_path / "out", tmp_path / "prompts"
    prompts.mkdir()
    write_dataset(prompts)
    job = ["run", "--prompts", str(prompts), "--output", str(output), *JOB, "--shard-size", "8", "--batch-size", "4"]
    assert cli.main([*job, "--address", cluster, "--limit", "20"]) in (0, 3)
    capsys.readouterr()
    summary = json.loads((output / "summary.json").read_text())
    made = ("--shard-size", "8", "--batch-size", "4")
    before = tree(output)
    code, printed = check(capsys, prompts, output, *made, "--limit", "20")
    assert code == 0, printed
    assert f"{summary['images']} of 20 images are made, at {summary['images_per_s']:.2f} images/s" in printed
    assert "resume   this job finds nothing left to make" in printed
    assert "time     none: all is made" in printed
    assert "plan     20 images in 3 shards and 5 batches of 4, padding 0.00%" in printed
    _, printed = check(capsys, prompts, output, "--shard-size", "2", "--batch-size", "4", "--limit", "20")
    assert "plan     20 images in 3 shards and 5 batches of 4" in printed, "that of the run, which stays"
    next(output.glob("images/*/*.png")).unlink()
    assert cli.main([*job, "--address", cluster, "--limit", "20", "--verify"]) == 1
    capsys.readouterr()
    before = [path for path in tree(output) if path.name != "manifest.parquet"]
    _, printed = check(capsys, prompts, output, *made, "--limit", "20")
    assert re.search(r"verified \d+ images at .*: 1 missing, 0 torn, 0 foreign \(images/", printed)
    shutil.rmtree(output / "manifest")
    (output / "manifest").mkdir()
    code, printed = check(capsys, prompts, output, *made, "--limit", "20")
    assert "resume   this job makes the other 3 shards" in printed
    rate = summary["buckets"][0]["card_images_per_s"] or summary["buckets"][0]["card_images_per_s_with_warmup"]
    assert rate
    assert "for 20 images on 2 cards (from the run in the output: " in printed
    code, printed = check(capsys, prompts, output, *made, "--limit", "20", "--seed", "7")
    assert code == 2
    assert "belongs to another job; what differs: seed: was 0, is 7." in printed
    left = [path for path in tree(output) if path.name != "manifest.parquet"]
    assert [path for path in before if "manifest/" not in str(path)] == left


def test_cards_that_would_be_idle_are_said(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = check(capsys, prompts, tmp_path / "out", "--cards", "8", "--shard-size", "256")
    assert "cards    5 of 8 cards will be idle: the plan has 3 shards; without --shard-size every card" in printed
    _, printed = check(capsys, prompts, tmp_path / "out", "--cards", "8")
    assert "100 images in 13 shards" in printed
    assert "idle" not in printed
    for size in ((), ("--shard-size", "256")):
        _, printed = check(capsys, prompts, tmp_path / "out", "--cards", "99", *size)
        assert " of 13 batches in all; fewer --cards will do" in printed
