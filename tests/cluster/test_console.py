"""A command's exit code and its end, whatever becomes of what it prints: pipes that close, disks that are full,
characters that can't be said, terminals that go; and errors that nobody has foreseen."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import command_line, read_manifest

from gaudi_batch.reporting.console import OutputLost, require_reader

COMMAND = (sys.executable, "-m", "gaudi_batch")
TIMEOUT_S = 60
"""For a process that is about to end."""


@pytest.fixture(scope="module")
def finished(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a job whose run is complete with one failed row: `run` has nothing to make, and its code is 3."""
    home = tmp_path_factory.mktemp("größe")
    pq.write_table(pa.table({"prompt": ["a", None, "c"], "größe": [1, 2, 3]}), home / "prompts.parquet")
    flags = [f"--prompts={home}/prompts.parquet", f"--output={home}/out", "--device=simulated", "--cards=1"]
    made = command_line("run", *flags, "--simulated.batch-seconds=0.01", "--address", cluster)
    assert made.returncode == 3, made.stderr
    return [*flags, "--simulated.batch-seconds=0.01"]


@contextlib.contextmanager
def sink(kind: str) -> Iterator[int]:
    """What a stream leads to: a pipe whose reader is gone, or a full disk."""
    if kind == "full disk":
        number = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, number = os.pipe()
        os.close(reader)
    try:
        yield number
    finally:
        os.close(number)


def with_output_to(kind: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    with sink(kind) as number:
        return subprocess.run(
            [*COMMAND, *arguments],
            stdout=number,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )


def with_errors_to(kind: str, *arguments: str) -> int:
    with sink(kind) as number:
        command = [*COMMAND, *arguments]
        return subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=number, timeout=TIMEOUT_S, check=False
        ).returncode


@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_a_run_ends_with_its_own_code_whoever_takes_what_it_prints(kind: str, finished: list[str]) -> None:
    result = with_output_to(kind, "run", *finished)
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert ("standard output can't be written: No space left on device" in result.stderr) == (kind == "full disk")


@pytest.mark.parametrize("command", ["status", "check", "--help", "--version"])
def test_what_is_asked_for_and_can_t_be_written_is_an_error_unless_its_reader_has_enough(
    command: str, finished: list[str]
) -> None:
    output = finished[1].partition("=")[2]
    arguments = {"status": ["status", output], "check": ["check", *finished]}.get(command, [command])
    full = with_output_to("full disk", *arguments)
    assert full.returncode == 1
    lines = full.stderr.splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["standard output can't be written: No space left on device"]
    closed = with_output_to("closed pipe", *arguments)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_characters_that_the_output_does_not_have_are_escaped(finished: list[str]) -> None:
    result = command_line("run", *finished, PYTHONIOENCODING="ascii")
    assert result.returncode == 3, result.stderr
    assert "gr\\xf6\\xdfe0/out/images" in result.stdout
    checked = command_line("check", *finished, PYTHONIOENCODING="ascii")
    assert checked.returncode == 0, checked.stderr
    assert "carried: gr\\xf6\\xdfe" in checked.stdout


@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_log_lines_that_nobody_takes_change_no_exit_code(kind: str, finished: list[str]) -> None:
    assert with_errors_to(kind, "run", *finished) == 3
    assert with_errors_to(kind, "status", "/nowhere") == 2
    assert with_errors_to(kind, "frobnicate") == 2


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    """Whatever writes to standard error, a library say, would write into it."""
    writes = "import os; os.write(1, b'a'); os.write(2, b'b'); os.read(0, 1)"
    emulate = [*COMMAND, "emulate", "--state", str(tmp_path), "--", sys.executable, "-c", writes]
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *emulate]
    assert subprocess.run(closed, timeout=TIMEOUT_S, check=False).returncode == 0


def test_a_run_goes_on_when_its_terminal_is_gone(cluster: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [f"prompt {row}" for row in range(64)]}), tmp_path / "prompts.parquet")
    flags = [f"--prompts={tmp_path}/prompts.parquet", f"--output={tmp_path}/out", "--device=simulated", "--cards=2"]
    flags += ["--address", cluster, "--simulated.batch-seconds=0.5", "--shard-size=8"]
    terminal, end = pty.openpty()
    run = subprocess.Popen([*COMMAND, "run", *flags], stdout=subprocess.DEVNULL, stderr=end, start_new_session=True)
    os.close(end)
    seen = b""
    while b"images/s faults" not in seen:  # the head of the table of cards
        seen += os.read(terminal, 65536)
    os.close(terminal)
    assert run.wait(TIMEOUT_S) == 0
    assert len(read_manifest(tmp_path / "out")) == 64


def test_a_log_for_machines_is_json_to_the_last_line_and_draws_nothing(finished: list[str]) -> None:
    terminal, end = pty.openpty()
    command = [*COMMAND, "run", *finished, "--log-format", "json"]
    run = subprocess.Popen(command, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    seen = b""
    with contextlib.suppress(OSError):  # the end of what was written to a terminal that nobody has open any more
        while data := os.read(terminal, 65536):
            seen += data
    os.close(terminal)
    assert run.wait(TIMEOUT_S) == 3
    lines = [json.loads(line) for line in seen.decode("ascii").splitlines()]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert (lines[-1]["state"], lines[-1]["images"], lines[-1]["failed_rows"]) == ("complete with failed rows", 2, 1)


UNFORESEEN = """
import os, sys, threading
from gaudi_batch.cli import commands, main as cli

def broken(parsed):
    hangs = threading.Thread(target=open, args=(sys.argv[-1],))
    hangs.start()
    raise {error}

commands.COMMANDS['status'] = broken
cli.entry()
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ValueError('s3://key:xyzzy-secret@bucket/\\x1b[31m')", "ValueError: s3://***@bucket/\\x1b[31m"),
        ("BrokenPipeError(32, 'of a socket')", "BrokenPipeError: [Errno 32] of a socket"),
        ("SystemExit('of a library')", "SystemExit: of a library"),
    ],
)
def test_an_error_that_nobody_has_foreseen_ends_the_process_though_storage_hangs(
    error: str, message: str, tmp_path: Path
) -> None:
    """Opening a FIFO that nobody writes to never ends."""
    os.mkfifo(tmp_path / "fifo")
    command = [sys.executable, "-c", UNFORESEEN.format(error=error), "status", str(tmp_path / "fifo")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        stderr = process.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"the process does not end: {process.communicate()[1]}")
    assert process.returncode == 1
    assert message in stderr
    assert "xyzzy" not in stderr


def test_an_interrupt_ends_a_command_that_waits_for_its_reader(finished: list[str]) -> None:
    output = finished[1].partition("=")[2]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x" * 65536):
            pass
    os.set_blocking(writer, True)
    command = [*COMMAND, "status", output]
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        while "pipe_write" not in Path(f"/proc/{process.pid}/wchan").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 130
    os.close(reader)
    os.close(writer)


def test_a_pipe_whose_reader_is_gone_is_seen_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        require_reader()
        os.close(reader)
        with pytest.raises(OutputLost) as lost:
            require_reader()
        assert lost.value.closed
