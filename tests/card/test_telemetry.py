"""Watts and joules of a card: they are what its counters say, and whatever the library does costs no image.

The library is a stand-in that is built here; the process that reads it, pyhlml and all between are the real ones.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import smalljob
from helpers import called, only_with, read_manifest, wait_until

from gaudi_batch.card import telemetry
from gaudi_batch.card.readings import Judge, Readings, Sample, over_time
from gaudi_batch.card.telemetry import LIBRARY_VARIABLE, Mark, Telemetry
from gaudi_batch.pipelines.simulated import SimulatedPipeline
from gaudi_batch.scheduling.backups import Backups

if not os.environ.get("CI"):
    pytest.importorskip("pyhlml")
pytestmark = only_with("gcc")  # it builds the stand-in


class StubDevice(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_ulonglong) for name in ("energy_mj", "memory_used", "throttle_bits")),
        *((name, ctypes.c_uint) for name in ("present", "module", "supported")),
        *((name, ctypes.c_uint) for name in ("power_mw", "temperature_c", "utilisation_percent")),
    )


class Stub(ctypes.Structure):
    """What the library says; see libhlml.c."""

    _fields_ = (("devices", StubDevice * 4), ("hang", ctypes.c_uint), ("crash", ctypes.c_uint))


def has_ended(card: Telemetry) -> bool:
    return card._process is None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hlml") / "libhlml.so"
    source = Path(__file__).with_name("libhlml.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", path, source], check=True)
    return path


@pytest.fixture
def stub(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Modules 0 to 2, and a gap before the last; their processes end with the test."""
    started: list[Telemetry] = []
    start = Telemetry._start

    def noted(self: Telemetry, *arguments: Any) -> None:
        started.append(self)
        start(self, *arguments)

    monkeypatch.setattr(Telemetry, "_start", noted)
    monkeypatch.setattr(telemetry, "ANSWER_TIMEOUT_S", 60.0)  # this machine may be busy
    path = tmp_path / "stub"
    path.write_bytes(bytes(ctypes.sizeof(Stub)))
    monkeypatch.setenv("HLML_STUB", str(path))
    monkeypatch.setenv(LIBRARY_VARIABLE, str(library))
    with path.open("r+b") as file:
        state = Stub.from_buffer(mmap.mmap(file.fileno(), 0))
    for index, module in ((0, 2), (1, 0), (3, 1)):
        device = state.devices[index]
        device.present, device.module, device.supported = 1, module, 1
        device.energy_mj, device.power_mw, device.temperature_c = 10**9 * (module + 1), 400_000 + module, 50 + module
        device.utilisation_percent, device.memory_used = 80 + module, (20 + module) * 10**9
    yield state
    state.hang = 0
    for each in started:
        if each._process is not None:
            each._process.kill()
    for each in started:
        wait_until(functools.partial(has_ended, each))  # its last line is no other test's


def of_module(stub: Any, module: int) -> Any:
    return next(device for device in stub.devices if device.present and device.module == module)


def used(card: Telemetry, stub: Any, module: int, joules: float) -> Readings:
    """A call of the pipeline that uses some joules."""
    of_module(stub, module).energy_mj += round(joules * 1000)
    return card.mark(0.0, time.monotonic()).readings()


def begun(module: int) -> Telemetry:
    """A card whose counters have been read once."""
    card = Telemetry(module)
    assert card.mark(0.0, time.monotonic()).readings().watts
    return card


def test_the_card_of_a_module_is_read_whatever_place_it_has_on_the_node(stub: Any) -> None:
    for module in (0, 1, 2):
        card = begun(module)
        now = Readings(12.5, 400 + module / 1000, 50 + module, (80 + module) / 100, (20 + module) * 1000, "")
        assert used(card, stub, module, 12.5) == now
        assert card.latest().watts == now.watts
        assert card.latest().energy_j is None


@pytest.mark.parametrize("others", [{}, {0: 7, 1: 7}])
def test_a_module_that_is_not_there_or_there_twice_is_not_read(
    others: dict[int, int], stub: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "FIND_TIMEOUT_S", 0.0)
    for index, module in others.items():
        stub.devices[index].module = module
    card = Telemetry(7)
    assert card.mark(0.0, time.monotonic()).readings() == Readings()
    wait_until(lambda: f"libhlml knows {len(others)} devices of module 7" in caplog.text)


def test_a_card_that_comes_back_from_a_reset_is_found(stub: Any) -> None:
    device = of_module(stub, 1)
    device.present = 0
    card = Telemetry(1)
    mark = card.mark(0.0, time.monotonic())
    device.present = 1
    assert mark.readings().watts == 400.001


def test_what_a_card_does_not_tell_is_null(stub: Any, caplog: pytest.LogCaptureFixture) -> None:
    of_module(stub, 0).supported = 0
    card = Telemetry(0)
    assert card.mark(0.0, time.monotonic()).readings() == Readings()
    assert not caplog.records


def a_run(tmp_path: Path, cluster: str) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """A run whose images are all made; returns its summary, its throughput lines, and what it prints."""
    smalljob.write_dataset(tmp_path)
    output, job = tmp_path / "out", tmp_path / "job.yaml"
    job.write_text(json.dumps(smalljob.a_job(tmp_path / "*.parquet", output)))
    done = called("run", job, "--address", cluster)
    assert done.returncode == 3, "one row can't be run"
    made = [row for row in read_manifest(output) if row["status"] == "ok"]
    assert len(made) == smalljob.ROWS - 1
    assert all((output / row["path"]).exists() for row in made)
    texts = [path.read_text() for path in (output / "throughput").rglob("*.jsonl")]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["retries"] == 0
    assert sum(card["faults"] for card in summary["cards"].values()) == 0
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return summary, lines, done.stdout + done.stderr


@pytest.fixture
def joules(stub: Any, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """The joules that each call of a simulated card uses, by module, other ones each time. A call begins once the end
    of the one before has been read, unless the library hangs."""
    used_by: dict[int, list[float]] = {0: [], 1: []}
    marks: dict[int, list[Mark]] = {0: [], 1: []}
    generate, mark = SimulatedPipeline.generate, Telemetry.mark

    def noted(self: Telemetry, *arguments: float) -> Mark:
        marks[self._module or 0].append(mark(self, *arguments))
        return marks[self._module or 0][-1]

    def generates(self: SimulatedPipeline, *arguments: Any) -> Any:
        module = self._module or 0
        assert marks[module][-1].answered.wait(0 if stub.hang else 60) or stub.hang
        used_by[module].append(100 + 7.25 * len(used_by[module]))
        of_module(stub, module).energy_mj += round(used_by[module][-1] * 1000)
        return generate(self, *arguments)

    monkeypatch.setattr(Telemetry, "mark", noted)
    monkeypatch.setattr(SimulatedPipeline, "generate", generates)
    return used_by


@pytest.mark.usefixtures("thread_cards")
def test_the_joules_of_all_batches_are_what_the_counters_went_up_by(
    cluster: str, stub: Any, joules: dict[int, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backups, "next", lambda backups, now: [])  # of two attempts at a shard one leaves no lines
    before = [of_module(stub, module).energy_mj for module in (0, 1)]
    summary, lines, printed = a_run(tmp_path, cluster)
    after = [of_module(stub, module).energy_mj for module in (0, 1)]
    total = (sum(after) - sum(before)) / 1000
    assert total > 1000
    assert sum(line["energy_j"] for line in lines) == pytest.approx(total)
    assert summary["energy_j"] == pytest.approx(total)
    assert summary["energy_images"] == summary["images"]
    assert summary["joules_per_image"] == pytest.approx(total / summary["images"], abs=1e-3)
    assert f"{total / 1000:,.1f} kJ, {total / summary['images']:,.1f} J an image" in printed
    for module in (0, 1):
        (card,) = [card for card in summary["cards"].values() if card["module"] == module]
        of_card = sorted(line["energy_j"] for line in lines if line["module"] == module)
        assert of_card == pytest.approx(sorted(joules[module])), "each batch has its own"
        assert card["energy_j"] == pytest.approx(sum(of_card))
        assert {line["watts"] for line in lines if line["module"] == module} == {400 + module / 1000}
    progress = json.loads((tmp_path / "out/progress.json").read_text())
    assert sum(card["energy_j"] for card in progress["cards"].values()) == pytest.approx(total)


@pytest.mark.usefixtures("thread_cards", "joules")
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("hang", ""),
        ("crash", "no watts and joules from now on: libhlml ended with -11"),
        ("lie", "libhlml gives energy_mj 1844674407"),
    ],
)
def test_a_library_that_hangs_crashes_or_lies_costs_no_image(
    fault: str, says: str, cluster: str, stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "ANSWER_TIMEOUT_S", 0.1 if fault == "hang" else 60.0)
    stub.hang, stub.crash = fault == "hang", fault == "crash"
    if fault == "lie":
        for device in stub.devices:
            device.energy_mj = 2**64 - 10**9
            device.power_mw = device.temperature_c = device.utilisation_percent = 2**32 - 1
            device.memory_used = 2**63
    summary, lines, printed = a_run(tmp_path, cluster)
    assert summary["energy_j"] is summary["joules_per_image"] is None
    names = ("energy_j", "watts", "temperature_c", "utilisation", "memory_used_mb")
    assert {line[name] for line in lines for name in names} == {None}
    assert [printed.count(f"module {module}: {says}") for module in (0, 1)] == [1 if says else 0] * 2, printed
    assert "Traceback" not in printed
    assert " J an image" not in printed


def test_a_counter_is_believed_within_what_a_card_can_draw(caplog: pytest.LogCaptureFixture) -> None:
    judge = Judge(3)

    def at(seconds: float, joules: float) -> Sample:
        return Sample(seconds, round(joules * 1000), Readings())

    assert judge.joules(at(0, 5e6), at(10, 5e6 + 6000)) == 6000
    assert judge.joules(at(0, 5e6), at(0.01, 5e6 + 600)) == 600, "the counter may be written late"
    assert not caplog.records
    assert judge.joules(at(0, 5e6), at(10, 5e6 - 1)) is None, "back"
    assert judge.joules(at(0, 5e6), at(10, 5e6 + 30_000)) is None, "3 kW"
    assert judge.joules(at(0, 5e6), Sample(10, None, Readings())) is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING], "one warning"
    assert "module 3: libhlml gives an energy counter that went back by 1 J" in caplog.text


def test_a_counter_that_stands_still_is_not_one() -> None:
    judge = Judge(0)
    answers = [judge.judge({"at": second, "energy_mj": 7000}).energy_mj for second in range(13)]
    assert answers == [7000] * 11 + [None] * 2
    assert judge.judge({"at": 13.0, "energy_mj": 7001}).energy_mj == 7001


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("power_mw", [0, 999, 2_000_001, -1, 2.5, float("nan"), "400000", True]),
        ("temperature_c", [0, 151, 2**32 - 1]),
        ("utilisation_percent", [-1, 101]),
        ("memory_used", [-1, 2**40 + 1]),
        ("energy_mj", [0, -5, 2**64 - 1, float("nan")]),
    ],
)
def test_what_no_card_says_is_not_recorded(name: str, values: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    judge = Judge(0)
    for value in values:
        sample = judge.judge({"at": 1.0, name: value})
        assert (sample.energy_mj, sample.now) == (None, Readings()), value
    assert len(caplog.records) == 1
    assert f"libhlml gives {name} {values[0]!r}" in caplog.text


def test_a_call_has_the_mean_of_its_watts_and_the_highest_of_its_temperatures() -> None:
    judge = Judge(0)
    samples = [
        judge.judge(
            {
                "at": float(number),
                "power_mw": watts * 1000,
                "temperature_c": 60 + number,
                "memory_used": 10**9 * number,
                "utilisation_percent": 10 * number,
                "throttle_bits": bits,
            }
        )
        for number, watts, bits in [(1, 400, 0), (2, 500, 2), (3, 600, 3)]
    ]
    assert over_time(7.0, samples) == Readings(7.0, 500, 63, 0.2, 3000, "thermal and power")
    assert over_time(None, samples[:1]).throttled == ""
    assert over_time(None, [Sample(0.0, None, Readings())]) == Readings()


def test_what_is_read_too_late_is_of_no_call(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = begun(0)
    assert used(card, stub, 0, 10).energy_j == 10
    stub.hang = 1
    with monkeypatch.context() as patched:
        patched.setattr(telemetry, "ANSWER_TIMEOUT_S", 0.0)
        late = card.mark(0.0, time.monotonic())
        assert late.readings() == Readings(), "nobody waits for it"
        of_module(stub, 0).energy_mj += 20_000
        stub.hang = 0
        assert late.answered.wait(60)
    assert late.result == Readings()
    assert used(card, stub, 0, 30).energy_j is None, "whether the 20 J are of this call is not known"
    assert used(card, stub, 0, 40).energy_j == 40


def test_a_process_that_stands_still_holds_nobody_up(stub: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Its pipe is full at some time, and from then on nothing is written into it."""
    card = begun(0)
    process = card._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    marks = [card.mark(0.0, float(number)) for number in range(30_000)]
    assert marks[-1].answered.is_set(), "it could not be sent, and is not waited for"
    assert caplog.text.count("no watts and joules while libhlml does not answer") == 1


PARENT = """
import time
from gaudi_batch.card.telemetry import Telemetry
card = Telemetry(0)
card.mark(0.0, time.monotonic()).readings()
print(card._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("hangs", [False, True])
def test_the_process_ends_with_that_of_its_card_whatever_the_library_does(hangs: bool, stub: Any) -> None:
    stub.hang = hangs
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        assert b"gaudi_batch.card.hlml" in Path(f"/proc/{process}/cmdline").read_bytes()
        parent.kill()
    wait_until(lambda: _is_over(process))


def _is_over(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_node_is_told_what_it_lacks_where_it_has_cards(
    stub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    card = Telemetry(0)
    assert card.mark(0.0, 1.0).readings() == card.latest() == Readings()
    assert card.note("hpu GAUDI3") == (
        f"no watts and joules: there is no {tmp_path}/absent.so; {LIBRARY_VARIABLE} names another place"
    )
    assert card.note("simulated") == card.note("hpu GAUDI2 (emulated)") == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Telemetry(0).note("hpu GAUDI3") == "no watts and joules: install habana-pyhlml, of the driver's release"
    assert Telemetry(None).note("cpu") == ""


def test_the_process_imports_nothing_heavy() -> None:
    code = "import sys, gaudi_batch.card.hlml, pyhlml; print({'ray', 'torch', 'numpy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"
