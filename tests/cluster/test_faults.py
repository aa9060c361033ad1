"""Nothing is lost, whatever breaks: each fault is a real one, on cards of a real Ray cluster."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import threadcards
from helpers import called, command_line, read_manifest, wait_for_commits, wait_until
from ray.util import placement_group_table, remove_placement_group
from raynodes import follow

from gaudi_batch import JobConfig, RunResult, RunStopped, StorageError, run
from gaudi_batch.output import lease
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.storage import disk

FAST = {"batch_seconds": 0.02}
AT_ONCE = ("--simulated.batch-seconds", "0.02")
"""Of a run that finishes another."""


def finish(*command: str | Path) -> int:
    """Goes on with a run to its end, here and with cards that are threads; returns the exit code."""
    with pytest.MonkeyPatch.context() as patched:
        threadcards.put_in_place(patched)
        return called(*command, *AT_ONCE).returncode


def make(prompts: Path, output: Path, cluster: str, simulated: dict[str, Any], **fields: Any) -> RunResult:
    fields = {"shard_size": 16, "cards": 2} | fields
    config = JobConfig(
        prompts=str(prompts), output=str(output), device="simulated", simulated=FAST | simulated, **fields
    )
    return run(config, address=cluster)


def outcome(output: Path) -> tuple[list[int], dict[int, str]]:
    """Rows that were made, and those that failed with their errors."""
    rows = read_manifest(output)
    made = sorted(row["row"] for row in rows if row["status"] == "ok")
    return made, {row["row"]: row["error"] for row in rows if row["status"] == "failed"}


def test_a_row_that_kills_its_process_is_recorded_and_its_neighbours_are_made(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    result = make(prompts, tmp_path / "out", cluster, {"kill_rows": [37]})
    made, failed = outcome(tmp_path / "out")
    assert made == [row for row in range(100) if row != 37]
    assert "process died" in failed[37]
    # A fourth where its card died before it could say that it had begun this shard and not the one before.
    assert 3 <= sum(card["faults"] for card in result.summary["cards"].values()) <= 4


def test_a_row_that_hangs_is_killed_at_the_limit_and_recorded(prompts: Path, tmp_path: Path, cluster: str) -> None:
    limits = {"batch": 4.0, "first_batch": 4.0}
    make(prompts, tmp_path / "out", cluster, {"hang_rows": [90]}, limits=limits)
    made, failed = outcome(tmp_path / "out")
    assert made == [row for row in range(100) if row != 90]
    assert "limits." in failed[90]


@pytest.mark.usefixtures("thread_cards")
def test_a_card_that_always_fails_is_quarantined_and_costs_no_row(
    prompts: Path, tmp_path: Path, cluster: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("gaudi_batch"), "propagate", True)
    held: list[int] = []

    def removed(group: Any) -> None:
        held.append(sum(group["state"] == "CREATED" for group in placement_group_table().values()))
        remove_placement_group(group)

    monkeypatch.setattr("gaudi_batch.driver.places.remove_placement_group", removed)
    broken = {"broken_modules": [1], "batch_seconds": 1.0}
    result = make(prompts, tmp_path / "out", cluster, broken, cards=3, shard_size=4)
    assert result.exit_code == 0
    assert outcome(tmp_path / "out") == (list(range(100)), {})
    assert all(card["images"] == 0 for card in result.summary["cards"].values() if card["module"] == 1)
    assert held[0] >= 3, "its group is held until the end"
    (message,) = [record.getMessage() for record in caplog.records if "is quarantined" in record.getMessage()]
    assert "module 1" in message
    status = called("status", tmp_path / "out").stdout
    assert re.search(r"card     \S+-1: quarantined", status)


@pytest.mark.usefixtures("thread_cards")
def test_a_job_that_names_a_number_of_cards_gets_so_many_that_work(prompts: Path, tmp_path: Path, cluster: str) -> None:
    result = make(prompts, tmp_path / "out", cluster, {"unloadable_modules": [0, 1], "batch_seconds": 1}, cards=2)
    assert result.exit_code == 0
    assert outcome(tmp_path / "out") == (list(range(100)), {})
    assert {card["module"] for card in result.summary["cards"].values() if card["images"]} == {2, 3}


@pytest.mark.usefixtures("thread_cards")
def test_cards_that_can_not_load_stop_the_run_with_their_error(prompts: Path, tmp_path: Path, cluster: str) -> None:
    with pytest.raises(RunStopped, match="simulated failure to load on module"):
        make(prompts, tmp_path / "out", cluster, {"unloadable_modules": [0, 1, 2, 3]})


@pytest.mark.usefixtures("thread_cards")
def test_cards_that_hang_while_they_load_are_given_up_and_named(prompts: Path, tmp_path: Path, cluster: str) -> None:
    with pytest.raises(RunStopped, match=r"loading took longer than 1 s \(limits.loading\)"):
        make(prompts, tmp_path / "out", cluster, {"load_seconds": 600}, limits={"loading": 1}, cards=1)


@pytest.mark.thorough
def test_a_card_whose_process_stands_still_is_replaced(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "1", "--shard-size", "8"),
        *("--limits.batch", "3", "--limits.first-batch", "3", "--limits.answer", "3"),
        *("--cards", "1"),  # another would make the shard, too, and the run would end before the limit
    )
    driver = start_driver(*command)
    wait_for_commits(output, 1)
    card = next(iter(read_progress(output)["cards"].values()))
    os.kill(card["pid"], signal.SIGSTOP)
    _, log = driver.communicate(timeout=120)
    assert driver.returncode == 0, log
    assert "limits." in log
    assert outcome(output) == (list(range(100)), {})


def read_progress(output: Path) -> dict[str, Any]:
    """What progress.json says once it names a card's process."""
    progress: dict[str, Any] = {}

    def is_ready() -> bool:
        if (output / "progress.json").exists():
            progress.update(json.loads((output / "progress.json").read_text()))
        return bool(progress.get("cards")) and all(card["pid"] for card in progress["cards"].values())

    wait_until(is_ready)
    return progress


def test_two_drivers_that_are_both_forced_to_run_make_every_image_once(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    forced = (
        "import sys; from gaudi_batch.output.holder import Lease; from gaudi_batch.cli.main import main;"
        "Lease.is_alive = lambda held: False; sys.exit(main(sys.argv[1:]))"
    )
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "0.1", "--shard-size", "4"),
    )
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", forced, *map(str, command)],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    logs = [driver.communicate(timeout=200)[1] for driver in drivers]
    codes = sorted(driver.returncode for driver in drivers)
    assert codes in ([0, 0], [0, 1], [0, 2]), logs  # one may see that it is not alone before it begins
    assert codes != [0, 1] or any("drives this run now" in log for log in logs), logs
    assert outcome(output) == (list(range(100)), {})
    assert files_named(output) == files_there(output)


@pytest.mark.parametrize(
    "seen", [pytest.param("lease.json", marks=pytest.mark.thorough), "images/*/*.png", "manifest/*.parquet"]
)
def test_a_driver_killed_at_any_moment_leaves_a_run_that_finishes(
    prompts: Path, tmp_path: Path, cluster: str, seen: str
) -> None:
    """It is killed when there are so many of what it writes."""
    count = 1 if seen == "lease.json" else random.randint(1, 50) if "images" in seen else 9
    print(count, seen)
    output = tmp_path / "out"
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "0.3", "--shard-size", "8"),
    )
    driver = start_driver(*command)
    wait_until(lambda: len(list(output.glob(seen))) >= count)
    driver.kill()
    driver.communicate()
    before = {path: path.read_bytes() for path in output.glob("manifest/*.parquet")}
    assert finish(*command) == 0
    assert all(path.read_bytes() == data for path, data in before.items())
    assert outcome(output) == (list(range(100)), {})
    assert files_named(output) == files_there(output)


def test_a_manifest_that_is_torn_while_the_run_goes_on_is_missed_at_its_end(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "1", "--shard-size", "8"),
    )
    driver = start_driver(*command)
    wait_for_commits(output, 1)
    os.truncate(next(output.glob("manifest/*.parquet")), 200)
    _, log = driver.communicate(timeout=120)
    assert driver.returncode == 1, log
    assert "1 manifests that were in place are gone or torn" in log
    assert json.loads((output / "summary.json").read_text())["state"] == "stopped"
    assert finish(*command) == 0
    assert outcome(output) == (list(range(100)), {})
    assert files_named(output) == files_there(output)


def test_prompts_that_change_while_the_run_goes_on_stop_it(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    driver = start_driver(
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "1", "--shard-size", "4"),
    )
    wait_for_commits(output, 3)
    files = sorted(prompts.glob("*.parquet"))
    for file in files:
        table = pq.read_table(file)
        pq.write_table(table.set_column(0, "prompt", pa.array(["another one"] * len(table))), file)
    _, log = driver.communicate(timeout=120)
    assert driver.returncode == 1, log
    assert "is not what it was when it was planned" in log
    made = [row for path in output.glob("manifest/*") for row in pq.read_table(path).column("prompt").to_pylist()]
    assert "another one" not in made


def test_storage_that_fails_one_card_alone_is_that_card_s_fault(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    driver = start_driver(
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "1", "--shard-size", "4", "--storage-patience", "2"),
    )
    card = next(iter(read_progress(output)["cards"].values()))
    resource.prlimit(card["pid"], resource.RLIMIT_FSIZE, (0, 0))
    _, log = driver.communicate(timeout=120)
    assert driver.returncode == 0, log
    assert "File too large" in log
    assert outcome(output) == (list(range(100)), {})
    assert files_named(output) == files_there(output)


def test_sigterm_means_the_same_when_the_images_are_made_and_where_sigint_is_ignored(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    slow = "from gaudi_batch.cli import main; from gaudi_batch.driver import finalize; import sys, time;"
    slow += " finalize.verify_run = lambda *_: print('verifying', file=sys.stderr, flush=True) or time.sleep(100);"
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "0.01", "--verify"),
    )
    driver = subprocess.Popen(
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", f"{slow} sys.exit(main.main(sys.argv[1:]))"]
        + [str(part) for part in command],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert follow(driver, "^verifying$")
    driver.send_signal(signal.SIGTERM)
    _, log = driver.communicate(timeout=80)  # before it has verified
    assert driver.returncode == 130, log
    assert json.loads((output / "lease.json").read_text())["released"]


def job(prompts: Path, output: Path, cluster: str) -> tuple[str | Path, ...]:
    """What the command line of each job here begins with."""
    where = ("--prompts", prompts, "--output", output)
    return ("run", *where, "--device", "simulated", "--address", cluster, "--cards", "2")


def start_driver(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gaudi_batch", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def test_a_killed_driver_costs_nothing_that_was_committed(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "2", "--shard-size", "8"),
    )
    driver = start_driver(*command)
    wait_for_commits(output, 2)
    driver.kill()
    driver.communicate()
    committed = {path: path.stat().st_mtime_ns for path in output.glob("manifest/*.parquet")}
    assert (output / "lease.json").exists()
    assert f"stopped (its driver, process {driver.pid} on" in called("status", output).stdout
    assert finish(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in committed} == committed
    assert outcome(output) == (list(range(100)), {})
    named = {row["path"] for row in read_manifest(output)}
    stored = {str(path.relative_to(output)) for path in (output / "images").rglob("*.png")}
    assert stored == named, "leavings of the killed driver"


def test_an_interrupted_run_commits_what_is_in_hand_and_can_be_resumed(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "2", "--shard-size", "8"),
    )
    driver = start_driver(*command)
    wait_for_commits(output, 2)
    driver.send_signal(signal.SIGTERM)
    _, log = driver.communicate(timeout=60)
    assert driver.returncode == 130, log
    assert "the same command resumes" in log
    assert json.loads((output / "lease.json").read_text())["released"]
    assert len(list(output.glob("images/*-*"))) == len(list(output.glob("manifest/*.parquet")))
    assert called("status", output).stdout.startswith(f"{output}: stopped (interrupted)")
    assert finish(*command) == 0
    assert outcome(output) == (list(range(100)), {})


def test_a_second_signal_stops_at_once(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    command = (
        *job(prompts, output, cluster),
        *("--shard-size", "8"),
    )
    driver = start_driver(*command, "--simulated.batch-seconds", "60", "--grace", "100")
    read_progress(output)
    driver.send_signal(signal.SIGINT)
    assert follow(driver, "once more stops at once")
    driver.send_signal(signal.SIGINT)
    _, log = driver.communicate(timeout=50)  # before a batch has ended
    assert driver.returncode == 130, log
    assert "interrupted at once" in log
    assert finish(*command) == 0
    assert outcome(output) == (list(range(100)), {})
    assert files_named(output) == files_there(output)


def test_a_second_driver_is_refused_while_the_first_lives(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    command = (
        *job(prompts, output, cluster),
        *("--simulated.batch-seconds", "0.3", "--shard-size", "8"),
    )
    driver = start_driver(*command, "--simulated.batch-seconds", "60")
    read_progress(output)
    second = command_line(*command)
    assert second.returncode == 2
    assert f"process {driver.pid}" in second.stderr
    driver.kill()
    driver.communicate()


def files_named(output: Path) -> set[str]:
    """Paths that the manifests of the shards name."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["path"]) for path in (output / "manifest").glob("*.parquet")]
    return {path for table in tables for path in table.column("path").to_pylist()}


def files_there(output: Path) -> set[str]:
    return {str(path.relative_to(output)) for path in (output / "images").rglob("*.png")}


@pytest.mark.usefixtures("thread_cards")
def test_a_run_that_is_abandoned_while_commits_are_under_way_keeps_their_images(
    prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three manifests are written and about to get their names when the store fails the fourth."""
    commit, link, calls = Ledger.commit, disk._link, list[CommitInfo]()
    held, landed, abandoned = list[Path](), list[Path](), threading.Event()

    def late(part: Path, path: Path) -> bool:
        if path.parent.name != "manifest":
            return link(part, path)
        held.append(path)
        abandoned.wait(60)
        is_new = link(part, path)
        landed.append(path)
        return is_new

    def then_broken(self: Ledger, info: CommitInfo, data: bytes) -> bool:
        calls.append(info)
        if len(calls) < 4:
            return commit(self, info, data)
        wait_until(lambda: len(held) == 3)
        raise StorageError("the store is gone")

    monkeypatch.setattr(disk, "_link", late)
    monkeypatch.setattr(Ledger, "commit", then_broken)
    monkeypatch.setattr("gaudi_batch.driver.committer.CLOSE_TIMEOUT_S", 0.1)
    with pytest.raises(RunStopped, match="the store is gone"):
        make(prompts, tmp_path / "out", cluster, {}, shard_size=8)
    abandoned.set()
    wait_until(lambda: len(landed) == 3)
    assert len(list((tmp_path / "out/manifest").iterdir())) == 3
    assert files_named(tmp_path / "out") <= files_there(tmp_path / "out")
    monkeypatch.setattr(Ledger, "commit", commit)
    monkeypatch.setattr(lease, "LEASE_TTL_S", 2.0)  # for which the next driver waits, as manifests could still land
    make(prompts, tmp_path / "out", cluster, {}, shard_size=8)
    assert outcome(tmp_path / "out") == (list(range(100)), {})
    assert files_named(tmp_path / "out") <= files_there(tmp_path / "out")


@pytest.mark.usefixtures("thread_cards")
def test_what_a_driver_that_was_taken_for_dead_commits_after_all_stays(
    prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster, {})
    manifests = {number: output / f"manifest/{number:06d}.parquet" for number in (2, 4)}
    held = {number: path.read_bytes() for number, path in manifests.items()}
    for path in manifests.values():
        path.unlink()
    stalled = next((output / "images").glob("*-*")).name.partition("-")[2][:5]
    lease = {"driver": stalled, "host": "h", "machine": "m", "pid": 1, "started": "1", "beat": 1, "dead": []}
    (output / "lease.json").write_text(json.dumps(lease | {"released": True}))
    commit = Ledger.commit

    def overtaken(self: Ledger, info: CommitInfo, data: bytes) -> bool:
        manifests[info.shard].write_bytes(held[info.shard])
        return commit(self, info, data)

    monkeypatch.setattr(Ledger, "commit", overtaken)
    result = make(prompts, output, cluster, {})
    assert outcome(output) == (list(range(100)), {})
    assert result.summary["images"] == 100
    assert files_named(output) == files_there(output)


@pytest.mark.usefixtures("thread_cards")
@pytest.mark.thorough
def test_a_refused_start_does_not_forget_who_left_orphans(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster, {})
    lease = {"driver": "aaaaa", "host": "h", "machine": "m", "pid": 1, "started": "1", "beat": 1, "dead": ["bbbbb"]}
    (output / "lease.json").write_text(json.dumps(lease | {"released": True}))
    (output / "images/000001-bbbbb7").mkdir()
    (output / "images/000001-bbbbb7/00000001-00.png").write_bytes(b"left behind")
    (output / "images/000001-ddddd7").mkdir()
    (output / "timeline/ddddd-000000.jsonl").write_bytes(b"")
    (output / "manifest/000001.parquet").unlink()
    killed = [output / "manifest/.000001.parquet.part-0123abcd", output / "rollup/bbbbb000001.parquet"]
    killed[1].parent.mkdir(exist_ok=True)
    left = [output / "images/000001-bbbbb7", output / "images/000001-ddddd7", *killed]
    for path in killed:
        path.write_bytes(b"half")
    with pytest.raises(RunStopped):
        make(prompts, output, cluster, {"unloadable_modules": [0, 1, 2, 3]})
    assert all(path.exists() for path in left)
    make(prompts, output, cluster, {})
    assert not any(path.exists() for path in left)


@pytest.mark.usefixtures("thread_cards")
def test_rows_that_never_reach_a_pipeline_do_not_stop_the_job(tmp_path: Path, cluster: str) -> None:
    """As where captions are sorted, and the empty ones come first: two whole shards of them."""
    table = pa.table({"prompt": [None if row < 512 else f"prompt {row}" for row in range(2560)]})
    pq.write_table(table, tmp_path / "prompts.parquet")
    fields = {"shard_size": 256, "batch_size": 128, "cards": 1}  # one card makes the shards one after the other
    result = make(tmp_path / "prompts.parquet", tmp_path / "out", cluster, {}, **fields)
    assert result.exit_code == 3
    made, failed = outcome(tmp_path / "out")
    assert made == list(range(512, 2560))
    assert set(failed.values()) == {"prompt is null"}


def test_an_image_that_no_card_can_encode_fails_its_row_and_is_asked_of_two(
    tmp_path: Path, cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A WebP side has at most 16,383 pixels."""
    widths = [16384 if row == 21 else 64 for row in range(40)]
    table = pa.table({"prompt": [f"prompt {row}" for row in range(40)], "width": widths, "height": [8] * 40})
    pq.write_table(table, tmp_path / "prompts.parquet")
    output = tmp_path / "out"
    fields = {"encoding": {"type": "webp"}, "batch_size": 2, "max_pixels": 2**22}
    make(tmp_path / "prompts.parquet", output, cluster, {"batch_seconds": 0.2}, **fields)
    made, failed = outcome(output)
    assert made == [row for row in range(40) if row != 21]
    assert "can't be encoded" in failed[21]
    assert json.loads((output / "summary.json").read_text())["retries"] == 0, "its shard was not made again"
    assert not [name for name in map(str, output.glob("images/*/*21-00.webp"))]
