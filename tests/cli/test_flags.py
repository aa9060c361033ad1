"""The flags and fields of a job as people type them: misspelt, short, and in the help."""

from __future__ import annotations

import gzip
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gaudi_batch.cli import main as cli
from gaudi_batch.cli.flags import job_from
from gaudi_batch.cli.parser import parse
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError

JOB = ("--device", "simulated", "--cards", "2")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "key": ["x", "y"]}), path)
    return path


def check(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Runs `check`; returns its exit code and all that it printed."""
    code = cli.main(["check", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_section_that_may_be_absent_is_a_mapping_on_the_command_line() -> None:
    parsed = parse(["check", "--prompts", "p", "--output", "o", "--model", "builtin:shapes",
                    "--gaudi.quantize", "{config: /etc/measure.json, mode: measure}"])  # fmt: skip
    quantize = job_from(parsed).gaudi.quantize
    assert quantize is not None
    assert (quantize.config, quantize.mode) == ("/etc/measure.json", "measure")
    parsed = parse(
        ["check", "--prompts", "p", "--output", "o", "--model", "builtin:shapes", "--gaudi.quantize", "null"]
    )
    assert job_from(parsed).gaudi.quantize is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://h/x?a=1,2", [("https://h/x?a=1,2", None)]),
        ("curl -d @- https://h/x # a, b: c", [(None, "curl -d @- https://h/x # a, b: c")]),
        ("{url: https://h/x, format: slack}", [("https://h/x", None)]),
        ("[https://h/x, {command: 'true'}]", [("https://h/x", None), (None, "true")]),
        ("[]", []),
    ],
)
def test_who_is_told_of_the_end_is_a_text_a_mapping_or_a_list(text: str, told: list[tuple[str, str]]) -> None:
    parsed = parse(["check", "--prompts", "p", "--output", "o", "--model", "builtin:shapes", "--on-end", text])
    assert [(each.url, each.command) for each in job_from(parsed).on_end] == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--batch_size", "4"], "--batch_size; did you mean --batch-size?"),
        (["run", "--bath-size=4"], "--bath-size; did you mean --batch-size?"),
        (["check", "job.yaml", "--gaudi.hpu_graphs", "no"], "--gaudi.hpu_graphs; did you mean --gaudi.hpu-graphs?"),
        (
            ["run", "--storage_options.secret=hunter2"],
            "--storage_options.secret; did you mean --storage-options.secret?",
        ),
        (["run", "--retry_failed"], "--retry_failed; did you mean --retry-failed?"),
        (["submit", "--jobid", "x"], "--jobid; did you mean --job-id?"),
        (["stop", "job", "--adress", "x"], "--adress; did you mean --address?"),
        (["run", "--limits", "{batch: 3}"], "--limits has fields of its own: --limits.loading, "),
        (["run", "--qqqq"], "unrecognized arguments: --qqqq ("),
        (["chekc", "job.yaml"], "'chekc'; did you mean check?"),
    ],
)
def test_a_misspelt_flag_is_told_the_right_one(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("batch-size: 4", "batch-size: is not a field of a job; did you mean batch_size?"),
        ("stepz: 4", "stepz: is not a field of a job; did you mean steps?"),
        ("encoding: {typ: png}", "encoding.typ: is not a field of a job; did you mean encoding.type?"),
        ("columns: {promt: text}", "'promt' is no column that a job knows; did you mean 'prompt'?"),
        ("gaudi: {config: {use_autocast: true}}", "did you mean 'use_torch_autocast'?"),
        ("qqqq: 4", "qqqq: is not a field of a job"),
        ("limits: 20", "limits: 20: must be a mapping of loading, first_batch, batch, answer, cluster"),
    ],
)
def test_a_misspelt_field_of_a_job_file_is_told_the_right_one(
    fields: str, message: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"prompts: {prompts}\noutput: {tmp_path / 'out'}\ndevice: simulated\n{fields}\n")
    code, printed = check(capsys, file)
    assert code == 2
    assert message in printed


@pytest.mark.parametrize(
    ("file", "flags", "kind", "quality"),
    [
        ("jpeg", (), "jpeg", 95),
        ("{type: jpeg, quality: 70}", ("--encoding", "webp"), "webp", 70),
        ("jpeg", ("--encoding.quality", "70"), "jpeg", 70),
        ("png", ("--encoding", "{type: jpeg, quality: 70}"), "jpeg", 70),
    ],
)
def test_an_encoding_may_be_its_type_alone(
    file: str, flags: tuple[str, ...], kind: str, quality: int, prompts: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"prompts: {prompts}\noutput: {tmp_path / 'out'}\ndevice: simulated\nencoding: {file}\n")
    from gaudi_batch.cli.flags import job_from

    config = job_from(parse(["run", str(job), *flags]))
    assert (config.encoding.type, config.encoding.quality) == (kind, quality)


def test_an_encoding_that_is_none_is_refused_by_its_choices(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = check(capsys, "--prompts", prompts, "--output", tmp_path / "out", *JOB, "--encoding", "jpg")
    assert code == 2
    assert "encoding.type: 'jpg': input should be 'png', 'jpeg' or 'webp'" in printed


@pytest.mark.parametrize(
    "flags",
    [
        ("--columns", "prompt=text", "--columns", "id=key"),
        ("--columns", "prompt=text,id=key"),
        ("--columns=prompt=text", "--columns.id", "key"),
        ("--columns", "{prompt: text, id: key}"),
    ],
)
def test_columns_are_named_in_pairs(
    flags: tuple[str, ...], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed = check(capsys, "--prompts", prompts, "--output", tmp_path / "out", *JOB, *flags)
    assert code == 0, printed
    assert "columns  prompt=text, id=key" in printed


@pytest.mark.parametrize("columns", ["prompt=text,id=key", "prompt=text, id=key"])
def test_columns_are_named_in_pairs_in_a_file_and_in_python_too(columns: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"prompts: p\noutput: o\ndevice: simulated\ncolumns: '{columns}'\n")
    named = {"prompt": "text", "id": "key"}
    assert JobConfig.load(job).columns == named
    fields: dict[str, Any] = {"columns": columns}
    assert JobConfig(prompts="p", output="o", device="simulated", **fields).columns == named
    with pytest.raises(InputError, match="columns: 'prompt': "):
        JobConfig(prompts="p", output="o", device="simulated", **{"columns": "prompt"})


@pytest.mark.parametrize(
    ("command", "module", "resumes"), [("check", "cli.check", False), ("run", "driver.runner", True)]
)
def test_what_is_interrupted_is_told_to_be_given_again_where_that_resumes(
    command: str,
    module: str,
    resumes: bool,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"gaudi_batch.{module}.{command}", interrupted)
    assert cli.main([command, "--prompts", str(prompts), "--output", str(tmp_path / "out"), *JOB]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("interrupted; the same command resumes" if resumes else "interrupted")


def test_other_mappings_and_lists_take_what_is_short_too() -> None:
    from gaudi_batch.cli.flags import job_from

    given = ("--prompts", "p", "--output", "o", *JOB, "--storage-options", "anon=true")
    config = job_from(parse(["run", *given, "--simulated.raise-rows", "1, 2", "--simulated.kill-rows", "3"]))
    assert config.storage_options == {"anon": True}
    assert (config.simulated.raise_rows, config.simulated.kill_rows) == ((1, 2), (3,))


@pytest.mark.parametrize("value", ["500%", "-1%", "1.5", "5.0", "nan%", "nan", "many", "-3"])
def test_a_share_or_count_of_failed_rows_that_can_t_be(
    value: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ("--prompts", prompts, "--output", tmp_path / "out", *JOB, "--columns.prompt", "text")
    code, printed = check(capsys, *job, f"--max-failed={value}")
    assert code == 2
    assert f"max_failed: '{value}': must be a count, as 100, or a share of the rows, as 5% or 0.05" in printed


@pytest.mark.parametrize(("value", "meant"), [("100%", 1.0), ("0.5%", 0.005), ("1.0", 1.0), ("1", 1), ("0", 0)])
def test_a_share_or_count_of_failed_rows(value: str, meant: float) -> None:
    config = JobConfig.load(None, {"prompts": "p", "output": "o", "device": "simulated", "max_failed": value})
    assert (config.max_failed, type(config.max_failed)) == (meant, type(meant))
    with pytest.raises(InputError, match="max_failed"):
        JobConfig.load(None, {"prompts": "p", "output": "o", "device": "simulated", "max_failed": 5.0})


def test_the_help_names_each_entry_and_what_it_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "--device {auto,hpu,cpu,simulated}",
        "--dtype {float32,bfloat16,null}",
        "--encoding.type {png,jpeg,webp}",
        "--encoding {png,jpeg,webp} Short for --encoding.type.",
        "--gaudi.hpu-graphs {true,false} Whether to capture the UNet as an HPU graph and replay it. (default: true)",
        "--cards {all,NUMBER}",
        "--columns.NAME VALUE",
        "one of prompt, id, negative_prompt, seed, width, height, steps, guidance_scale, num_images",
        "--storage-options.NAME VALUE",
        "--limits.first-batch NUMBER",
        "relative to the working directory",
    ):
        assert words in printed, words


def test_relative_paths_of_a_job_file_belong_to_the_working_directory(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they always have: a run that is half done stays where its job file finds it."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/job.yaml").write_text("prompts: prompts.parquet\noutput: out\ncolumns: {prompt: text}\n")
    monkeypatch.chdir(tmp_path)
    code, printed = check(capsys, "jobs/job.yaml", *JOB)
    assert code == 0, printed
    monkeypatch.chdir(tmp_path / "jobs")
    code, printed = check(capsys, "job.yaml", *JOB)
    assert code == 2
    assert f"{tmp_path}/jobs/prompts.parquet': there is no such file or directory" in printed


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", b"prompt\na\n"),
        ("p.tsv", b"prompt\tid\na\tb\n"),
        ("p.csv.gz", gzip.compress(b"prompt\na\n", mtime=0)),
        ("p.jsonl", b'{"prompt": "a"}\n'),
        ("p.json", b'[{"prompt": "a"}]'),
        ("o'clock.txt", b"a\nb\n"),
    ],
)
@pytest.mark.parametrize("whole_directory", [False, True])
def test_prompts_that_are_no_parquet_get_the_command_that_converts_them(
    name: str,
    content: bytes,
    whole_directory: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command does."""
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    given = directory if whole_directory else directory / name
    code, printed = check(capsys, "--prompts", given, "--output", tmp_path / "out", *JOB)
    assert code == 2
    (line,) = printed.splitlines()
    program, *arguments = shlex.split(line.partition("`")[2].rpartition("`")[0])
    assert (program, cli.main(arguments)) == ("gaudi-batch", 0)
    code, _ = check(capsys, "--prompts", arguments[2], "--output", tmp_path / "out", *JOB)
    assert code == 0


def test_an_empty_file_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.parquet").write_bytes(b"")
    code, printed = check(capsys, "--prompts", tmp_path / "p.parquet", "--output", tmp_path / "out", *JOB)
    assert code == 2
    assert "prompts file 'p.parquet' is empty (0 bytes); " in printed
