"""`gaudi-batch emulate -- CMD`: runs any command as on a machine with Gaudi cards, computed by the CPU.

The folder `site/` holds a stand-in for Intel's `habana_frameworks` and is on Python's path only in what runs under this
command. Everything is passed on by environment variables, so it holds for every process that the command starts, the
workers of a Ray cluster included.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gaudi_batch.errors import InputError

SITE = Path(__file__).parent / "site"


@dataclass(frozen=True)
class Machine:
    """The machine to emulate; None leaves a value to the environment (GAUDI_EMULATOR_MODULES and so on)."""

    modules: str | None = None
    """Number of modules, or their ids separated by commas, as in `4,5,6,7`; default 8."""
    capture_seconds: float | None = None
    """Seconds that each graph capture takes, as compilation does on a card; default 0."""
    memory_gib: float | None = None
    """Device memory of one card; default 96."""
    faults: tuple[str, ...] | None = None
    """Faults to inject, each `acquire`, `oom` or `hang`, then `:MODULE`, `@LAUNCH`, `xTIMES` as wished."""
    driver: str | None = None
    """Release of the driver and the firmware; default that of the stand-in, 1.24.0."""
    state: str | None = None
    """Directory of the module locks and of `counters/<pid>.json`; None for one that all programs of the user share."""

    def environment(self) -> dict[str, str]:
        """The environment of a process on this machine.

        Raises:
            InputError: modules, faults or memory make no sense.
        """
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise InputError(f"emulate: --memory-gib is {self.memory_gib:g}; a card has more than 0")
        if self.capture_seconds is not None and not self.capture_seconds >= 0:
            raise InputError(f"emulate: --capture-seconds is {self.capture_seconds:g}; it must be 0 or more")
        sys.path.insert(0, str(SITE))
        try:
            from habana_frameworks._emulation.settings import Settings, default_state
        finally:
            sys.path.remove(str(SITE))
        try:
            state = Path(self.state or os.environ.get("GAUDI_EMULATOR_STATE") or default_state()).absolute()
        except (OSError, KeyError):  # there is no temporary directory, or the user has no name
            raise InputError("emulate: there is no place for its state; name a directory with --state") from None
        wished = {
            "GAUDI_EMULATOR_MODULES": self._module_ids(),
            "GAUDI_EMULATOR_CAPTURE_SECONDS": self.capture_seconds,
            "GAUDI_EMULATOR_MEMORY_GIB": self.memory_gib,
            "GAUDI_EMULATOR_FAULTS": None if self.faults is None else " ".join(self.faults),
            "GAUDI_EMULATOR_DRIVER": self.driver,
            "GAUDI_EMULATOR_STATE": state,
        }
        inherited = {name: value for name, value in os.environ.items() if name in wished}
        described = inherited | {name: str(value) for name, value in wished.items() if value is not None}
        try:
            Settings.from_environment(described)
        except ValueError as error:
            raise InputError(str(error)) from error
        folder = state / "bin"
        # Beside this Python are gaudi-batch, and the pip that optimum-habana asks which habana-torch-plugin there is.
        folders = [str(folder), os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
        python_path = [str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
        return described | {
            "GAUDI_EMULATOR_BIN": str(folder),
            "PATH": os.pathsep.join(folders),
            "PYTHONPATH": os.pathsep.join(python_path),
        }

    def prepare(self) -> dict[str, str]:
        """Puts `hl-smi` in place and makes every fault possible again; returns the environment.

        Raises:
            InputError: as `environment` does, or the state can't be written.
        """
        environment = self.environment()
        state = Path(environment["GAUDI_EMULATOR_STATE"])
        try:
            self._fill(state, environment)
        except OSError as error:
            raise InputError(
                f"emulate: {error.filename or state} can't be written: {error.strerror}; choose another directory with"
                " --state"
            ) from None
        return environment

    def _fill(self, state: Path, environment: Mapping[str, str]) -> None:
        shutil.rmtree(state / "faults", ignore_errors=True)
        folder = state / "bin"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if state.stat().st_uid != os.getuid():
            raise InputError(f"{state} belongs to another user; choose another directory with --state")
        # optimum-habana starts hl-smi with an empty environment, so all that it needs is written here.
        described = " ".join(
            f"{name}={shlex.quote(value)}"
            for name, value in environment.items()
            if name.startswith("GAUDI_EMULATOR_") or name == "PYTHONPATH"
        )
        command = f"{shlex.quote(sys.executable)} -m habana_frameworks._emulation.hl_smi"
        script = folder / f"hl-smi.{os.getpid()}"
        script.write_text(f'#!/bin/sh\n{described} exec {command} "$@"\n')
        script.chmod(0o755)
        script.replace(folder / "hl-smi")

    def _module_ids(self) -> str | None:
        if self.modules is None:
            return None
        try:
            numbers = [int(number) for number in self.modules.split(",")]
        except ValueError:
            numbers = []
        if "," not in self.modules:
            numbers = list(range(*numbers)) if numbers else []
        if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
            raise InputError(f"--modules {self.modules}: a number of modules or their ids, as 8 or 4,5,6,7")
        return ",".join(map(str, numbers))


def emulate(command: Sequence[str], machine: Machine) -> NoReturn:
    """Replaces this process by the command, on the emulated machine; does not return.

    Raises:
        InputError: there is no command, or no such command.
    """
    if not command:
        raise InputError("emulate: no command; write it after --, as in gaudi-batch emulate -- python script.py")
    environment = os.environ | machine.prepare()
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        raise InputError(f"emulate: {command[0]}: {error.strerror}") from error
