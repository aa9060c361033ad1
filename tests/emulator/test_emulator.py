"""The emulator: one process per module, cards that Ray finds by itself, and the real optimum-habana on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import TESTS, command_line

from gaudi_batch.emulator import SITE, Machine

HOLD = "from habana_frameworks._emulation.modules import acquire; print(acquire(), flush=True); input()"
TAKE = "from habana_frameworks._emulation.modules import acquire; print(acquire())"
MODULES = "2,3,8,9"
BUSY = "synStatus=8 [Device not found] Device acquire failed."


def emulated(machine: Machine, code: str, **environment: str) -> subprocess.Popen[str]:
    """Python code in a process on the emulated machine."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | machine.prepare() | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def take(machine: Machine, **environment: str) -> str:
    """What acquiring gives: the module's id, or the error."""
    process = emulated(machine, TAKE, **environment)
    output, errors = process.communicate(timeout=60)
    return output.strip() if process.returncode == 0 else errors.strip().splitlines()[-1]


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_module_is_held_by_one_process_until_that_is_gone(tmp_path: Path) -> None:
    machine = Machine(modules="2", state=str(tmp_path))
    first = emulated(machine, HOLD, HABANA_VISIBLE_MODULES="1")
    assert read(first) == "1"
    assert take(machine, HABANA_VISIBLE_MODULES="1") == f"RuntimeError: {BUSY}"
    assert take(machine) == "0"  # whoever names none gets a free one
    second = emulated(machine, HOLD, HABANA_VISIBLE_MODULES="0")
    assert read(second) == "0"
    assert take(machine) == f"RuntimeError: {BUSY}"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert take(machine) == "1"
    second.communicate("\n", timeout=60)
    counted = json.loads((tmp_path / "counters" / f"{first.pid}.json").read_text())
    assert (counted["module"], counted["acquires"]) == (1, 1)


def test_module_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    range_error = "RuntimeError: Invalid HABANA_VISIBLE_MODULES={}. Module IDs should be between {} and {}"
    one = Machine(modules="1", state=str(tmp_path))
    assert take(one, HABANA_VISIBLE_MODULES="5") == range_error.format(5, 0, 0)
    upper_half = Machine(modules="4,5,6,7", state=str(tmp_path))
    assert take(upper_half) == "4"
    assert take(upper_half, HABANA_VISIBLE_MODULES="6") == "6"
    assert take(upper_half, HABANA_VISIBLE_MODULES="0") == range_error.format(0, 4, 7)


def test_refused_acquisition_can_be_injected(tmp_path: Path) -> None:
    machine = Machine(modules="2", state=str(tmp_path), faults=("acquire:1",))
    environment = os.environ | machine.prepare() | {"HABANA_VISIBLE_MODULES": "1"}
    results = [
        subprocess.run([sys.executable, "-c", TAKE], env=environment, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert BUSY in results[0].stderr
    assert results[1].stdout.strip() == "1"


def test_launches_fail_or_hang_on_demand(tmp_path: Path) -> None:
    launch = (
        "from habana_frameworks._emulation import faults, modules\n"
        "from habana_frameworks._emulation.counters import counters\n"
        "modules.acquire()\n"
        "for _ in range(5):\n"
        "  counters.count('mark_steps')\n"
        "  try: faults.check_launch(); print('ok', flush=True)\n"
        "  except RuntimeError as error: print(error, flush=True)\n"
    )
    machine = Machine(modules="1", state=str(tmp_path), faults=("oom@2x2", "hang:0@5"))
    first = emulated(machine, launch)
    lines = [read(first) for _ in range(4)]
    assert [line == "ok" for line in lines] == [True, False, False, True]
    assert "PT_DEVMEM Allocation failed for size" in lines[1]
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.5)
    first.kill()
    first.wait()
    environment = os.environ | machine.environment()  # the same machine, whose faults are used up
    again = subprocess.run(
        [sys.executable, "-c", launch], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert again.stdout.split() == ["ok"] * 5


def test_hl_smi_tells_what_each_module_does(tmp_path: Path) -> None:
    machine = Machine(modules="4,5", state=str(tmp_path), memory_gib=32)
    holder = emulated(machine, HOLD, HABANA_VISIBLE_MODULES="5")
    assert read(holder) == "5"
    query = ["hl-smi", "-Q", "index,module_id,memory.total,power.draw,utilization.aip", "-f", "csv,noheader,nounits"]
    answer = command_line("emulate", "--modules", "4,5", "--memory-gib", "32", "--state", tmp_path, "--", *query)
    assert answer.stdout.splitlines() == ["0, 4, 32768, 90, 0", "1, 5, 32768, 380, 100"]
    table = command_line("emulate", "--modules", "4,5", "--state", tmp_path, "--", "hl-smi").stdout.splitlines()
    assert "Driver Version:" in table[2]
    assert any(str(holder.pid) in line for line in table)
    holder.communicate("\n", timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modules", "4,4", "--", "true"], "a number of modules or their ids"),
        (["--modules", "x", "--", "true"], "a number of modules or their ids"),
        (["--modules", "0-3", "--", "true"], "a number of modules or their ids"),
        (["--memory-gib", "-5", "--", "true"], "--memory-gib is -5; a card has more than 0"),
        (["--capture-seconds", "-1", "--", "true"], "--capture-seconds is -1; it must be 0 or more"),
        (["--fault", "fire", "--", "true"], "'fire' is no fault"),
        (["--", "no-such-command"], "no-such-command: No such file"),
        ([], "no command"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    refused = command_line("emulate", "--state", tmp_path, *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr


def test_the_command_sees_the_stand_in_and_nobody_else_does(tmp_path: Path) -> None:
    show = "import importlib.metadata as m, sys; print(m.version('habana-torch-plugin')); sys.exit(7)"
    printed = command_line("emulate", "--state", tmp_path, "--", sys.executable, "-c", show)
    assert (printed.returncode, printed.stdout.strip()) == (7, "1.24.0")
    assert str(SITE) not in sys.path


@pytest.mark.torch
@pytest.mark.timeout(900)
def test_optimum_habana_runs_on_the_emulated_device(tmp_path: Path) -> None:
    run = command_line(
        *("emulate", "--state", tmp_path, "--capture-seconds", "0.1", "--memory-gib", "1", "--"),
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "emulated"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.thorough
@pytest.mark.torch
def test_diffusers_own_pipelines_run_on_the_emulated_device_in_eager_mode(tmp_path: Path) -> None:
    """Which it is in if no variable says so."""
    run = command_line(
        *("emulate", "--state", tmp_path, "--memory-gib", "1", "--"),
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS / "eager"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.thorough
@pytest.mark.ray
@pytest.mark.torch
def test_ray_finds_the_cards_and_each_actor_holds_its_own(tmp_path: Path) -> None:
    run = command_line(
        *("emulate", "--state", tmp_path, "--modules", MODULES, "--", sys.executable, TESTS / "emulated/cluster.py"),
        HABANA_VISIBLE_MODULES=MODULES,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    info = json.loads(run.stdout.splitlines()[-1])
    assert info["resources"] == 4
    for card in [*info["held"], info["replacement"]]:
        assert card["visible"] == card["still_visible"]
        assert (card["count"], card["device"], card["acquired_by_import"]) == (1, "hpu:0", False)
    all_held = [*info["held"], *info["rest"]]
    assert sorted(int(card["visible"]) for card in all_held) == [2, 3, 8, 9]
    assert all(card["module"] == int(card["visible"]) for card in info["rest"])
    assert info["replacement"]["visible"] == info["held"][1]["visible"]
    counted = [json.loads(path.read_text()) for path in (tmp_path / "counters").glob("*.json")]
    expected = {card["pid"]: int(card["visible"]) for card in [*all_held, info["replacement"]]}
    assert {record["pid"]: record["module"] for record in counted} == expected  # no driver, no raylet


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/state"])
def test_a_state_that_can_not_be_written_is_refused_with_a_sentence(place: str) -> None:
    refused = command_line("emulate", "--state", place, "--", "true")
    assert "Traceback" not in refused.stderr
    assert refused.returncode == 2
    assert place in refused.stderr
    assert "choose another directory with --state" in refused.stderr


NO_OPTIMUM = """
import importlib.metadata, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "optimum" or name.startswith("optimum."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
found = importlib.metadata.version

def version(name):
    if name == "optimum-habana":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.version = version
"""


def test_a_run_without_optimum_habana_is_refused_before_it_begins_an_output(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_OPTIMUM)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "prompts.parquet")
    job = [f"--prompts={tmp_path}/prompts.parquet", f"--output={tmp_path}/out", "--model=builtin:shapes"]
    command = [sys.executable, "-m", "gaudi_batch", "run", *job, "--device=hpu"]
    refused = command_line(
        "emulate", "--state", tmp_path / "state", "--", *command, PYTHONPATH=f"{tmp_path}/site:{TESTS.parent}"
    )
    assert refused.returncode == 2
    assert "optimum-habana is not installed here" in refused.stderr
    assert not (tmp_path / "out").exists()
