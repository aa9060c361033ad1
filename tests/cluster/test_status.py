"""What `status` says of a run from its output alone, above all whether it still goes on."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from helpers import command_line, read_manifest, wait_until

from gaudi_batch.cli import main as cli
from gaudi_batch.reporting import status

ELSEWHERE = {"host": "driver-pod-7", "machine": "another boot", "pid": 12}


def change(path: Path, **fields: Any) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(record))
    return record


def asked(output: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert cli.main(["status", str(output), *flags]) == 0
    return capsys.readouterr().out


def hours_ago(hours: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.thorough
def test_a_driver_that_died_elsewhere_is_silent_and_one_that_counts_runs(
    write_prompts: Callable[..., Path],
    tmp_path: Path,
    cluster: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, count = tmp_path / "out", 100
    prompts = write_prompts({"prompt": [None if row in (1, 3) else f"prompt {row}" for row in range(count)]})
    flags = ("--device", "simulated", "--cards", "1", "--shard-size", "4", "--batch-size", "4")
    job = ("run", "--prompts", str(prompts), "--output", str(output), "--address", cluster, *flags)
    slow = ("--simulated.batch-seconds", "2")
    driver = subprocess.Popen([sys.executable, "-m", "gaudi_batch", *job, *slow], stderr=subprocess.DEVNULL)
    progress = output / "progress.json"
    wait_until(lambda: progress.exists() and json.loads(progress.read_text())["failed_rows"] >= 2, 120)
    driver.kill()
    driver.wait()
    change(output / "lease.json", **ELSEWHERE)

    change(progress, time=hours_ago(3.2), seconds_left=77)
    monkeypatch.setattr(status, "WATCH_TIMEOUT_S", 0.5)
    told = json.loads(asked(output, capsys, "--json"))
    assert told["state"] == "silent"
    assert told["silent_s"] == pytest.approx(3.2 * 3600, abs=60)
    assert told["seconds_left"] is None
    text = asked(output, capsys)
    silent = "silent for 3 h 12 min; its driver, process 12 on driver-pod-7, may be dead; the same command resumes"
    assert text.startswith(f"{output}: {silent}\n")
    assert " left" not in text
    assert told["failures"] == [{"reason": "prompt is null", "rows": 2, "first_ids": ["1", "3"]}]
    assert "failed   2 rows: prompt is null (id 1, 3)" in text

    monkeypatch.setattr(status, "WATCH_TIMEOUT_S", 60.0)
    counting = threading.Event()

    def count_up() -> None:
        while not counting.wait(0.2):
            lease = json.loads((output / "lease.json").read_text())
            (tmp_path / "next").write_text(json.dumps(lease | {"beat": lease["beat"] + 1}))
            (tmp_path / "next").rename(output / "lease.json")

    alive = threading.Thread(target=count_up)
    alive.start()
    told = json.loads(asked(output, capsys, "--json"))
    counting.set()
    alive.join()
    assert (told["state"], told["seconds_left"]) == ("running", 77), "its clock is wrong, and it lives"

    change(progress, time=hours_ago(0))
    began = time.monotonic()
    assert json.loads(asked(output, capsys, "--json"))["state"] == "running"
    assert time.monotonic() - began < 30, "what has just been written needs no second look"

    change(output / "lease.json", released=True)
    capsys.readouterr()
    assert cli.main(["status", str(output), "--watch"]) == 1
    assert capsys.readouterr().out.startswith(f"{output}: stopped\n")
    over = json.loads(asked(output, capsys, "--json"))
    assert over["state"] == "stopped"
    assert {(card["phase"], card["doing"], card["rows"]) for card in over["cards"].values()} == {(None, None, None)}
    assert command_line(*job, "--simulated.batch-seconds", "0").returncode == 3
    assert cli.main(["status", str(output), "--watch", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["state"] == "complete with failed rows"
    lost = next(row["path"] for row in read_manifest(output) if row["path"])
    (output / lost).unlink()
    assert command_line(*job, "--simulated.batch-seconds", "0", "--verify").returncode == 1
    told = json.loads(asked(output, capsys, "--json"))
    assert (told["state"], told["verify"]["missing"], told["verify"]["first_paths"]) == (
        "complete with failed rows",
        1,
        [lost],
    )
    assert f"1 missing, 0 torn, 0 foreign ({lost}; run --repair makes them again)" in asked(output, capsys)
