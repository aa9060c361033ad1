"""What machine is emulated: read from GAUDI_EMULATOR_* variables, which reach every process of a cluster."""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

GIB = 1024**3
SYNAPSE_VERSION = "1.24.0"
"""The release that the stand-in's metadata and hl-smi show, and that optimum-habana 1.21 was validated with."""

LAZY_MODE = "PT_HPU_LAZY_MODE"
"""Lazy mode is on if this is 1. Unset, releases since 1.21 take eager mode."""

_FAULT = re.compile(r"(?P<kind>acquire|oom|hang)(:(?P<module>\d+))?(@(?P<launch>\d+))?(x(?P<times>\d+))?")


@dataclass(frozen=True)
class Fault:
    """One injected fault, written `KIND[:MODULE][@LAUNCH][xTIMES]`.

    `acquire` refuses the device, `oom` fails for want of device memory and `hang` never returns, the latter two from
    launch number LAUNCH of a process on (a capture, a replay or a mark_step is a launch, in eager mode a copy to the
    host; the first is 1). It happens TIMES times (1 unless said) in all the processes that share a state directory.
    """

    text: str
    kind: str
    module: int | None
    launch: int
    times: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Reads the written form; ValueError with the form when it is another."""
        match = _FAULT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no fault: acquire, oom or hang, then [:MODULE][@LAUNCH][xTIMES]")
        module = None if match["module"] is None else int(match["module"])
        return cls(text, match["kind"], module, int(match["launch"] or 1), int(match["times"] or 1))


@dataclass(frozen=True)
class Settings:
    """One emulated machine."""

    modules: tuple[int, ...]
    """Ids of the modules that the machine has; a partitioned machine may have 4 to 7 only."""
    capture_seconds: float
    """What each graph capture costs, as compilation does on the device."""
    memory: int
    """Device memory of one module, in bytes."""
    faults: tuple[Fault, ...]
    driver: str
    """The release of the driver and the firmware; a node may have another than that of the container."""
    state: Path
    """Where module locks, counters and what faults remember are kept."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Reads GAUDI_EMULATOR_{MODULES,CAPTURE_SECONDS,MEMORY_GIB,FAULTS,DRIVER,STATE}."""
        modules = environment.get("GAUDI_EMULATOR_MODULES", "0,1,2,3,4,5,6,7")
        faults = environment.get("GAUDI_EMULATOR_FAULTS", "").split()
        return cls(
            modules=tuple(int(module) for module in modules.split(",")),
            capture_seconds=float(environment.get("GAUDI_EMULATOR_CAPTURE_SECONDS", "0")),
            memory=int(float(environment.get("GAUDI_EMULATOR_MEMORY_GIB", "96")) * GIB),
            faults=tuple(Fault.parse(fault) for fault in faults),
            driver=environment.get("GAUDI_EMULATOR_DRIVER", SYNAPSE_VERSION),
            state=Path(environment.get("GAUDI_EMULATOR_STATE") or default_state()),
        )


def default_state() -> Path:
    """One directory per user: all that a user emulates shares its modules, as programs share those of a machine."""
    return Path(tempfile.gettempdir()) / f"gaudi-emulator-{getpass.getuser()}"


def is_lazy() -> bool:
    """Whether this process is in lazy mode."""
    return os.environ.get(LAZY_MODE, "0") != "0"


@lru_cache
def settings() -> Settings:
    """This process's settings, read once."""
    return Settings.from_environment()
