"""What a driver logs is in its output, the error that ends it included, and an application's log is as before."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Unfenced, called, wait_until
from smalljob import a_job, write_dataset

from gaudi_batch import InputError, JobConfig, RunStopped
from gaudi_batch.driver import log_keeper
from gaudi_batch.driver.log_keeper import LogKeeper
from gaudi_batch.driver.runner import run
from gaudi_batch.errors import ForcedInterrupt, StorageError
from gaudi_batch.output import driver_log
from gaudi_batch.output.driver_log import DriverLog
from gaudi_batch.storage.store import Storage

log = logging.getLogger("gaudi_batch")
of_module = logging.getLogger("gaudi_batch.driver.loop")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) .*")


class Holder(Unfenced):
    driver = "aaaaa"


@pytest.fixture
def keeper(tmp_path: Path) -> LogKeeper:
    lease: Any = Holder()
    return LogKeeper(Storage(str(tmp_path)), lease)


@pytest.fixture
def application() -> Iterator[io.StringIO]:
    """What an application's own handler, that of the root logger, is given."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


def stored(output: Path) -> list[str]:
    """The lines of the log in an output, without their times."""
    text = "".join(path.read_text() for path in sorted((output / "log").glob("*.log")))
    assert all(LINE.fullmatch(line) for line in text.splitlines()), text
    return [line.partition(" ")[2] for line in text.splitlines()]


# -- pieces --------------------------------------------------------------------------------------------------------


def test_a_log_is_stored_in_pieces_of_bounded_size_and_each_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_log, "PIECE_BYTES", 100)
    kept, objects, puts = DriverLog("aaaaa"), {}, []

    def put(path: str, data: bytes) -> None:
        objects[path] = data
        puts.append(path)

    for number in range(40):
        kept.add(f"line {number}")
        if number % 7 == 0:
            kept.write(put)
    kept.write(put)
    kept.write(put)
    assert b"".join(objects.values()).decode().splitlines() == [f"line {number}" for number in range(40)]
    assert list(objects) == [f"log/aaaaa-{number:06d}.log" for number in range(1, len(objects) + 1)]
    assert all(len(data) <= 100 for data in objects.values())
    assert len(puts) <= len(objects) + 6, "what is new alone is written"


def test_lines_that_storage_does_not_take_come_later_and_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_log, "PIECE_BYTES", 100)
    kept = DriverLog("aaaaa")

    def refuse(path: str, data: bytes) -> None:
        raise StorageError("full")

    for number in range(1000):
        kept.add(f"line {number}")
    with pytest.raises(StorageError):
        kept.write(refuse)
    objects: dict[str, bytes] = {}
    kept.write(objects.__setitem__)
    lines = b"".join(objects.values()).decode().splitlines()
    assert lines[-1] == "line 999"
    assert len(objects) == driver_log.MAX_PIECES
    dropped = sum(int(match[1]) for line in lines if (match := re.match(r"\((\d+) earlier lines were dropped", line)))
    assert dropped > 0
    assert sum(line.startswith("line ") for line in lines) < 100


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_lines_from_before_the_lease_and_the_error_that_ends_the_run_are_stored(
    keeper: LogKeeper, tmp_path: Path
) -> None:
    def goes_wrong() -> None:
        of_module.info("waits for the lease")
        of_module.debug("nobody asked for this")
        with keeper.storing():
            of_module.warning("forged\n2026-01-01T00:00:00.000Z INFO line \x1b[31m")
            raise RunStopped("stopped: no card is left")

    with pytest.raises(RunStopped), keeper.listening():
        goes_wrong()
    assert stored(tmp_path) == [
        "INFO waits for the lease",
        "WARNING forged\\x0a2026-01-01T00:00:00.000Z INFO line \\x1b[31m",
        "ERROR stopped: no card is left",
    ]


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (ForcedInterrupt("interrupted at once"), "ERROR interrupted at once"),
        (KeyboardInterrupt(), "ERROR interrupted; the same command resumes"),
        (ValueError("nobody has foreseen\nthis"), "CRITICAL this"),
    ],
)
def test_whatever_ends_a_run_is_its_last_line(
    error: BaseException, last: str, keeper: LogKeeper, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), keeper.listening(), keeper.storing():
        raise error
    assert stored(tmp_path)[-1] == last
    assert any("Traceback" in line for line in stored(tmp_path)) == isinstance(error, ValueError)


def test_the_log_is_stored_while_the_run_goes_on(
    keeper: LogKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_keeper, "FIRST_WRITE_S", 0.01)
    monkeypatch.setattr(log_keeper, "WRITE_INTERVAL_S", 0.01)
    with keeper.listening(), keeper.storing():
        of_module.info("one")
        wait_until(lambda: stored(tmp_path) == ["INFO one"])
        of_module.info("two")
        wait_until(lambda: stored(tmp_path) == ["INFO one", "INFO two"])


def test_a_log_that_storage_does_not_take_is_a_warning(
    keeper: LogKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Storage, "put", lambda *_, **__: (_ for _ in ()).throw(StorageError("full", refused=True)))
    with keeper.listening(), keeper.storing():
        of_module.info("a line")
    assert "the log in the output is not up to date: full" in caplog.messages


def test_a_driver_that_may_not_hold_the_lease_stores_no_log(
    keeper: LogKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Holder, "holds", lambda self: False)
    with keeper.listening(), keeper.storing():
        of_module.info("a line")
    assert not (tmp_path / "log").exists()


# -- the application's own log ---------------------------------------------------------------------------------------


def test_an_application_gets_the_lines_that_it_got_before(
    keeper: LogKeeper, tmp_path: Path, application: io.StringIO
) -> None:
    own = io.StringIO()
    handler = logging.StreamHandler(own)
    log.addHandler(handler)
    asked = logging.getLogger("gaudi_batch.storage.store")
    asked.setLevel(logging.DEBUG)
    late = io.StringIO()
    try:
        with keeper.listening(), keeper.storing():
            logging.getLogger().addHandler(late_handler := logging.StreamHandler(late))
            of_module.info("of no interest to it")
            of_module.warning("a warning")
            asked.debug("asked for")
    finally:
        asked.setLevel(logging.NOTSET)
        logging.getLogger().removeHandler(late_handler)
    assert own.getvalue() == application.getvalue() == late.getvalue() == "a warning\nasked for\n"
    assert stored(tmp_path) == ["INFO of no interest to it", "WARNING a warning", "DEBUG asked for"]
    assert (log.level, log.propagate, log.handlers, handler.filters) == (logging.NOTSET, True, [handler], [])


def test_warnings_are_printed_where_an_application_has_no_handler(
    keeper: LogKeeper, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with keeper.listening():
        of_module.warning("a warning")
        of_module.info("of no interest")
        keeper.note("for the log in the output alone", logging.ERROR)
    assert capsys.readouterr().err == "a warning\n"


def test_of_two_runs_at_a_time_each_keeps_its_lines_to_its_end(tmp_path: Path, application: io.StringIO) -> None:
    lease: Any = Holder()
    first, second = (LogKeeper(Storage(str(tmp_path / name)), lease) for name in ("a", "b"))
    with second.listening(), second.storing():
        with first.listening(), first.storing():
            of_module.info("both")
        of_module.info("the second")
        of_module.warning("once")
    assert stored(tmp_path / "a") == ["INFO both"]
    assert stored(tmp_path / "b") == ["INFO both", "INFO the second", "WARNING once"]
    assert application.getvalue() == "once\n"
    assert log.level == logging.NOTSET


def test_a_line_that_can_not_be_formatted_ends_nothing(keeper: LogKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    with keeper.listening():
        of_module.info("%d", "no number")


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("thread_cards")
def test_a_run_and_the_one_that_resumes_it_leave_their_logs_without_secrets(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "xyzzy-of-somebody"
    monkeypatch.setenv("HF_TOKEN", secret)
    prompts, output = tmp_path / "prompts", tmp_path / f"out-{secret}"
    prompts.mkdir()
    write_dataset(prompts)
    broken = {"unloadable_modules": list(range(8))}
    with pytest.raises(RunStopped) as stopped:
        run(JobConfig(**a_job(prompts, output, simulated=broken)), address=cluster)
    first = stored(output)
    assert first[-1] == f"ERROR {stopped.value}"
    assert any("is quarantined" in line for line in first)
    config = JobConfig(**a_job(prompts, output))
    flags = [f"--prompts={prompts}", f"--output={output}", "--device=simulated", "--cards=2", "--address", cluster]
    flags += ["--shard-size=8", "--batch-size=4", "--simulated.batch-seconds=0.02"]
    ended = called("run", *flags)
    assert ended.returncode == 3, ended.stderr
    logs = sorted((output / "log").iterdir())
    assert len(logs) == 2
    text = "".join(path.read_text() for path in logs)
    assert secret not in text
    assert "complete with failed rows: 47 images" in text
    of_terminal = [line.partition(" ")[2] for line in ended.stderr.splitlines()]
    of_log = [line.split(" ", 2)[2] for line in text.splitlines()]
    assert [line for line in of_terminal if line not in of_log] == [], "what the terminal was told"
    with pytest.raises(InputError):
        run(config.model_copy(update={"steps": 7}), address=cluster)
    assert len(list((output / "log").iterdir())) == 2, "one that has no lease writes nothing"
