"""`status --watch` by the output alone: it waits for a run, follows it by few requests, and ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from helpers import called

from gaudi_batch.errors import StorageError
from gaudi_batch.output.holder import LEASE_TTL_S
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.reporting import watch as watching
from gaudi_batch.reporting.status import WATCH_TIMEOUT_S
from gaudi_batch.reporting.watch import Seen, Watcher, watch
from gaudi_batch.storage.store import Storage

LEASE = {"driver": "aaaaa", "host": "driver-pod-7", "machine": "another boot", "pid": 12, "started": "1"}
CARD = {"state": "ready", "doing": "batch, row 1, 2 s of 60 s", "images": 7, "images_per_s": 0.5, "faults": 0}


class Driver:
    """What a driver on another machine leaves in its output.

    Args:
        output: where.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self.beat = 0
        self.images = 0

    def write(self, name: str, record: dict[str, Any]) -> None:
        part = self._output.parent / f"{name}-part"
        part.write_text(json.dumps(record))
        self._output.mkdir(exist_ok=True)
        part.rename(self._output / name)

    def renew(self, **fields: Any) -> None:
        self.beat += 1
        self.write("lease.json", {**LEASE, "beat": self.beat, "dead": [], **fields})

    def report(self, **fields: Any) -> None:
        self.images += 1
        record = {"images": self.images, "images_total": 40, "images_per_s": 0.5, "failed_rows": 0, "seconds_left": 60}
        about = {"time": f"2026-01-01T00:00:{self.images:02d}Z", "state": "running", "drivers": [{"driver": "aaaaa"}]}
        self.write("progress.json", {**about, **record, "cards": {"host-0": CARD}, "faults": [], **fields})


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path / "out")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("gaudi_batch.reporting.watch.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def watcher(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Watcher:
    """One to which the status of a run that is over is that it is complete."""
    monkeypatch.setattr(watching, "read_status", lambda *_: {"state": "complete"})
    return Watcher(OutputReader(Storage(str(tmp_path / "out"), {}, 0.0)))


def seen(watcher: Watcher) -> Seen:
    told = watcher.ask()
    assert isinstance(told, Seen)
    return told


def test_a_run_is_waited_for_and_followed_to_its_end(driver: Driver, watcher: Watcher) -> None:
    assert seen(watcher).line() == "waiting; there is no run here yet (no run.json)"
    driver.renew()
    assert seen(watcher).line() == "running; its driver is starting"
    driver.write("run.json", {})
    driver.report()
    assert seen(watcher).line() == "1/40 images, 0.50 images/s, 1/1 cards, 0 failed rows, 1 min 00 s left; running"
    driver.report(state="over")
    over = seen(watcher)
    assert over.notes == ("makes no more images, and sums up",)
    assert (over.record["cards"]["host-0"]["doing"], over.record["seconds_left"]) == (None, None)
    driver.renew(released=True)
    assert watcher.ask() == {"state": "complete"}


def test_a_job_that_was_refused_before_it_had_a_run_is_waited_for(driver: Driver, watcher: Watcher) -> None:
    driver.renew(released=True)
    assert seen(watcher).state == "waiting"


def test_the_figures_of_an_earlier_driver_are_not_taken_for_this_one_s(driver: Driver, watcher: Watcher) -> None:
    driver.write("run.json", {})
    driver.report(drivers=[{"driver": "zzzzz"}])
    driver.renew()
    earlier = seen(watcher)
    assert earlier.notes == ("its driver is starting; the figures are those of the driver before",)
    assert (earlier.record["images"], earlier.record["cards"]["host-0"]["doing"]) == (1, None)


def test_a_driver_that_lives_is_followed_by_two_requests(
    driver: Driver, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.write("run.json", {})
    driver.renew()
    driver.report()
    requests: list[str] = []
    get = Storage.get

    def counted(storage: Storage, path: str) -> bytes | None:
        requests.append(path)
        return get(storage, path)

    monkeypatch.setattr(Storage, "get", counted)
    for name in ("names", "entries"):
        monkeypatch.setattr(Storage, name, lambda *_: pytest.fail("a list may be hundreds of requests"))
    for _ in range(3):
        assert seen(watcher).state == "running"
    assert requests == ["lease.json", "progress.json"] * 3


def begin(driver: Driver, watcher: Watcher) -> None:
    driver.write("run.json", {})
    driver.renew()
    driver.report()
    assert seen(watcher).state == "running"


def test_a_driver_that_falls_silent_is_told_of_and_then_over(
    driver: Driver, watcher: Watcher, clock: list[float]
) -> None:
    begin(driver, watcher)
    clock[0] += 10.0
    driver.report()
    assert seen(watcher).state == "running"
    clock[0] += WATCH_TIMEOUT_S + 5.0
    silent = seen(watcher)
    assert silent.state == "silent"
    assert silent.notes == ("its driver, process 12 on driver-pod-7, has not been heard of for 20 s, and may be dead",)
    driver.renew()
    assert seen(watcher).state == "running", "storage was slow"
    clock[0] += LEASE_TTL_S + 1.0
    assert watcher.ask() == {"state": "complete"}


def test_one_that_nobody_has_seen_alive_is_waited_for_no_longer_than_by_status(
    driver: Driver, watcher: Watcher, clock: list[float]
) -> None:
    begin(driver, watcher)
    clock[0] += WATCH_TIMEOUT_S + 1.0
    assert watcher.ask() == {"state": "complete"}


def test_storage_that_fails_for_a_while_is_told_of_and_no_silence_of_the_driver(
    driver: Driver, watcher: Watcher, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(driver, watcher)
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "get", lambda *_: (_ for _ in ()).throw(StorageError("no answer", refused=True)))
        for waited in ("0 s", "1 min 40 s"):
            failing = seen(watcher)
            assert failing.notes == (f"storage has failed for {waited}, and is asked again: no answer",)
            assert failing.record["images"] == 1, "what was seen last stays"
            clock[0] += 100.0
    assert seen(watcher).notes == ()
    clock[0] += WATCH_TIMEOUT_S - 1.0
    assert seen(watcher).state == "running"


def test_storage_that_does_not_answer_is_told_of_meanwhile(
    driver: Driver, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "ANSWER_S", -1.0)
    driver.write("run.json", {})
    driver.renew()
    driver.report()
    told, get = threading.Event(), Storage.get
    views: list[Seen] = []

    def show(seen: Seen) -> None:
        views.append(seen)
        if len(views) == 3:
            told.set()
            driver.renew(released=True)  # and so it is over
        elif len(views) == 1:
            monkeypatch.setattr(Storage, "get", lambda *arguments: told.wait(60) and get(*arguments))

    watch(watcher, show, 0.0)
    assert views[0].record == views[1].record, "the figures of before"
    assert (views[1].state, views[1].notes) == ("running", ("storage has not answered for 0 s",))
    assert views[1] is views[2], "who writes lines writes it once an interval"


def test_time_in_which_storage_did_not_answer_is_no_silence_of_the_driver(
    driver: Driver, watcher: Watcher, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(driver, watcher)
    get = Storage.get

    def slow(*arguments: Any) -> Any:
        clock[0] += WATCH_TIMEOUT_S
        return get(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "get", slow)
        assert seen(watcher).state == "running"
    clock[0] += 5.0
    assert seen(watcher).state == "running"
    clock[0] += WATCH_TIMEOUT_S
    assert watcher.ask() == {"state": "complete"}


def test_storage_that_refuses_the_first_question_is_an_error(watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storage, "get", lambda *_: (_ for _ in ()).throw(StorageError("no bucket", refused=True)))
    with pytest.raises(StorageError, match="no bucket"):
        watcher.ask()


def test_an_interval_needs_a_watch_and_a_second(tmp_path: Path) -> None:
    assert "there is no --watch" in called("status", tmp_path, "--interval", "5").stderr
    assert "'0.1' is less than a second" in called("status", tmp_path, "--watch", "--interval", "0.1").stderr
    for wrong in ("status", "frobnicate"):
        refused = called(wrong, "--log-format", "json", "--watches")
        assert refused.returncode == 2
        assert json.loads(refused.stderr)["level"] == "ERROR"


# -- a real process, which is interrupted ------------------------------------------------------------------------------


@pytest.fixture
def alive(driver: Driver) -> Iterator[Driver]:
    """A driver that goes on."""
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.2):
            driver.renew()
            driver.report()

    driver.write("run.json", {})
    thread = threading.Thread(target=go_on)
    thread.start()
    yield driver
    over.set()
    thread.join()


@pytest.mark.usefixtures("alive")
def test_on_a_terminal_the_view_is_redrawn_until_an_interrupt(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "gaudi_batch", "status", str(tmp_path / "out"), "--watch", "--interval", "1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    watch = subprocess.Popen(command, stdout=end, stderr=end, start_new_session=True, env=environment)
    os.close(end)
    screen = pyte.Screen(80, 24)
    stream = pyte.ByteStream(screen)
    images: list[str] = []
    while len(images) < 2:
        stream.feed(os.read(terminal, 65536))
        drawn = "\n".join(screen.display)
        counted = re.search(r"(\d+)/40 images, 0\.50 images/s, 1/1 cards", drawn)
        if counted and counted[1] not in images and "host-0 ready: batch, row 1, 2 s of 60 s" in drawn:
            images.append(counted[1])
    assert screen.display[0].startswith(f"{tmp_path}/out: running"[:60]), "it takes the place of the last picture"
    watch.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # the end of what was written to a terminal that nobody has open any more
        while data := os.read(terminal, 65536):
            stream.feed(data)
    assert watch.wait(60) == 130
    assert "interrupted" in "".join(screen.display)
    assert "Traceback" not in "".join(screen.display)
    assert "host-0" not in "".join(screen.display), "the view is removed"
    os.close(terminal)


@pytest.mark.usefixtures("alive")
def test_without_a_terminal_it_is_lines_or_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gaudi_batch", "status", str(tmp_path / "out"), "--watch", "--interval", "1"]
    with subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        first, second = (json.loads(watch.stdout.readline()) for _ in range(2))
        assert first["images"] < second["images"]
        assert second["cards"]["host-0"]["doing"] == CARD["doing"]
        assert (second["state"], second["cards_ready"], second["images_total"]) == ("running", 1, 40)
        watch.send_signal(signal.SIGINT)
        assert watch.wait(60) == 130
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        assert re.fullmatch(r"\d\d:\d\d:\d\d \d+/40 images, .*; running\n", watch.stdout.readline())
        watch.stdout.close()
        assert watch.wait(60) == 0, "its reader has what it wants"
