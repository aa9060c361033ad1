"""`tune` on a real Ray: a card is measured and given back, the job file changed, and `check` knows the time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import command_line

from gaudi_batch.bench.card import Loaded, MeasuredCards
from gaudi_batch.cli import main as cli

FLAGS = ("--calls", "2", "--simulated.batch-seconds", "0.05")


@pytest.fixture
def job_file(tmp_path: Path, prompts: Path) -> Path:
    path = tmp_path / "job.yaml"
    text = f"# mine\nprompts: {prompts}\noutput: {tmp_path / 'out'}\ndevice: simulated\n"
    text += "columns: {prompt: topic}  # which the bundled prompts lack\ncards: 2\nbatch_size: 2\nlimit: 90\n"
    path.write_text(text + "simulated: {batch_seconds: 0.05}\n")
    return path


def test_tune_writes_its_choice_and_check_says_how_long_the_job_takes(
    job_file: Path, cluster: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = job_file.read_text()
    assert cli.main(["tune", str(job_file), "--address", cluster, *FLAGS, "--max-batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("SIMULATED CARDS: they sleep for as long as the job says")
    assert "| 4          | " in printed
    assert "device memory" not in printed
    assert "stopped: --max-batch-size 4 allows no batch size over it" in printed
    assert "chosen: batch size 4, the fastest" in printed
    assert f"written: batch_size: 4 into {job_file}, where it was 2; a run that began with 2 goes on only" in printed
    assert job_file.read_text() == before.replace("batch_size: 2", "batch_size: 4")
    assert not (tmp_path / "out").exists()
    assert cli.main(["check", str(job_file)]) == 0
    assert " on 2 cards (from tune of 20" in capsys.readouterr().out
    # The card has been given back, and nothing is written where all is right already.
    job_file.chmod(0o600)
    stamp = job_file.stat().st_mtime_ns
    assert cli.main(["tune", str(job_file), "--address", cluster, *FLAGS, "--max-batch-size", "4"]) == 0
    assert f"{job_file} has batch_size: 4 already" in capsys.readouterr().out
    assert job_file.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("kill-rows", "a card's process died: "),
        ("raise-rows", "a card failed: RuntimeError: simulated failure of row 2"),
    ],
)
def test_a_size_that_fails_twice_ends_the_search_with_those_before(
    fault: str, why: str, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--device", "simulated", "--address", cluster, *FLAGS, f"--simulated.{fault}", "2", "--json")
    assert cli.main(["tune", *flags]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    assert [size["batch_size"] for size in figures["sizes"]] == [1, 2]
    assert figures["batch_size"] == 2
    assert figures["stopped"]["kind"] == "failure"
    assert why in figures["stopped"]["text"]
    assert figures["simulated"] is True
    assert figures["job_file"] is None
    assert "once more in a new process" in printed.err


def test_a_card_that_makes_no_image_is_an_error_and_changes_nothing(
    job_file: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = job_file.read_text()
    flags = ("--address", cluster, "--simulated.raise-rows", "0", "--calls", "1")
    assert cli.main(["tune", str(job_file), *flags]) == 1
    assert "a card failed: RuntimeError: simulated failure of row 0" in capsys.readouterr().err
    assert job_file.read_text() == before
    assert not job_file.with_name("job.tune.json").exists()


def test_a_job_file_that_is_gone_by_then_costs_no_figures(
    job_file: Path, cluster: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = MeasuredCards.load

    def remove_and_load(cards: MeasuredCards) -> Loaded:
        job_file.unlink()
        return load(cards)

    monkeypatch.setattr(MeasuredCards, "load", remove_and_load)
    assert cli.main(["tune", str(job_file), "--address", cluster, *FLAGS, "--max-batch-size", "1"]) == 2
    printed = capsys.readouterr()
    assert "chosen: batch size 1" in printed.out
    assert "job.yaml' can't be read: No such file or directory" in printed.err


def test_a_reader_that_takes_one_line_costs_no_choice(job_file: Path, cluster: str) -> None:
    script = f"{sys.executable} -m gaudi_batch tune {job_file} --address {cluster} {' '.join(FLAGS)} --max-batch-size 1"
    subprocess.run(["bash", "-c", f"{script} | true"], capture_output=True, timeout=240, check=True)
    assert "batch_size: 1\n" in job_file.read_text()


def test_without_a_job_file_the_line_to_put_there_is_printed(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--device", "simulated", "--address", cluster, *FLAGS, "--max-batch-size", "2")
    assert cli.main(["tune", *flags]) == 0
    assert capsys.readouterr().out.endswith("for the job file:\n\nbatch_size: 2\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--max-batch-size", "0"), "--max-batch-size is 0; it must be 1 or more"),
        (("--calls", "0"), "--calls is 0; it must be 1 or more"),
        (("one", "--model", "two"), "tune 'one' and --model 'two' name two models; name one"),
        (("nowhere.yaml",), "job file 'nowhere.yaml' is no file that could be written"),
        (("some/model", "nowhere.yaml"), "job file 'nowhere.yaml' is no file that could be written"),
    ],
)
def test_bad_usage_is_refused_before_ray_is_asked(
    arguments: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "--device", "simulated", "--address", "127.0.0.1:1", *arguments]) == 2
    assert error in capsys.readouterr().err


def test_bench_measures_one_card_and_all_at_once(cluster: str) -> None:
    speed = ("--simulated.batch-seconds", "0.05", "--batch-size", "2", "--calls", "2")
    printed = command_line("bench", "--device", "simulated", "--cards", "2", *speed, "--address", cluster)
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert lines[0].startswith("SIMULATED CARDS")
    assert re.search(r"\| one card +\| 0\.\d+ s \(.*\) \| [\d.]+ images/s", printed.stdout)
    assert re.search(r"\| 2 cards at once \| .* of 2 times one card \|", printed.stdout)
