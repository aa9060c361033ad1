"""`hl-smi`: the table of the modules, and the queries that scripts make of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from habana_frameworks._emulation.modules import holder
from habana_frameworks._emulation.settings import settings

DRIVER = f"{settings().driver}-emulated"
MIB = 1024**2
WIDTH = 78
IDLE_WATTS, BUSY_WATTS, MAX_WATTS = 90, 380, 600
IDLE_CELSIUS, BUSY_CELSIUS = 26, 44


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="hl-smi", description="Modules of the emulated machine.")
    parser.add_argument("-L", "--list", action="store_true", help="one line per module")
    parser.add_argument("--fw-versions", action="store_true", help="versions of the firmware of each module")
    parser.add_argument("-v", "--version", action="store_true", help="version of the tool")
    parser.add_argument("-Q", "--query-aip", metavar="FIELDS", help=", ".join(FIELDS))
    parser.add_argument("-f", "--format", default="csv", help="csv[,noheader][,nounits]")
    parser.add_argument("-i", "--id", help="only the module with this bus id")
    parsed = parser.parse_args(arguments)
    modules = [module for module in settings().modules if parsed.id in (None, _bus(module))]
    if parsed.version:
        print(f"hl-smi version: hl-{DRIVER}")
    elif parsed.fw_versions:
        for index, module in enumerate(modules):
            print(f"AIP {index} ({_bus(module)}): preboot hl-gaudi2-{settings().driver}-fw-62.0.1-sec-9, boot the same")
    elif parsed.list:
        for index, module in enumerate(modules):
            print(f"AIP {index}: HL-225 (UUID: {_uuid(module)}) module {module} bus {_bus(module)}")
    elif parsed.query_aip:
        return _query(modules, parsed.query_aip.split(","), parsed.format.split(","))
    else:
        _table(modules)
    return 0


def _bus(module: int) -> str:
    return f"0000:{0x19 + 0x11 * module:02x}:00.0"


def _uuid(module: int) -> str:
    return f"01P0-HL2080A0-15-TNPS34-03-07-{module:02d}"


def _used(module: int) -> int:
    """Bytes that the holder of a module says it uses."""
    try:
        counters = (settings().state / "counters" / f"{holder(module)}.json").read_text()
        return int(json.loads(counters)["memory_in_use"])
    except (OSError, ValueError):
        return 0


def _when_busy(busy: int, idle: int) -> Callable[[int, int], Any]:
    return lambda index, module: idle if holder(module) is None else busy


FIELDS: dict[str, tuple[str, Callable[[int, int], Any]]] = {
    "index": ("", lambda index, module: index),
    "module_id": ("", lambda index, module: module),
    "name": ("", lambda index, module: "HL-225"),
    "bus_id": ("", lambda index, module: _bus(module)),
    "uuid": ("", lambda index, module: _uuid(module)),
    "serial": ("", lambda index, module: f"AN{module:08d}"),
    "driver_version": ("", lambda index, module: DRIVER),
    "memory.total": ("MiB", lambda index, module: settings().memory // MIB),
    "memory.used": ("MiB", lambda index, module: _used(module) // MIB),
    "memory.free": ("MiB", lambda index, module: (settings().memory - _used(module)) // MIB),
    "utilization.aip": ("%", _when_busy(100, 0)),
    "temperature.aip": ("C", _when_busy(BUSY_CELSIUS, IDLE_CELSIUS)),
    "power.draw": ("W", _when_busy(BUSY_WATTS, IDLE_WATTS)),
}
"""Each field's unit and its value for the module of an index."""


def _query(modules: list[int], names: list[str], form: list[str]) -> int:
    unknown = [name for name in names if name not in FIELDS]
    if unknown or form[0] != "csv":
        print(f"hl-smi: not emulated: {', '.join(unknown) or form[0]}", file=sys.stderr)
        return 1
    if "noheader" not in form:
        print(", ".join(name + (f" [{FIELDS[name][0]}]" if FIELDS[name][0] else "") for name in names))
    for index, module in enumerate(modules):
        cells = []
        for name in names:
            unit, value = FIELDS[name]
            cells.append(f"{value(index, module)}" + (f" {unit}" if unit and "nounits" not in form else ""))
        print(", ".join(cells))
    return 0


def _table(modules: list[int]) -> None:
    def full(text: str) -> str:
        return f"| {text:<{WIDTH - 2}}|"

    rule = "|-------------------------------+----------------------+----------------------+"
    print("+" + "-" * (WIDTH - 1) + "+")
    print(full(f"HL-SMI Version:      hl-{DRIVER}"))
    print(full(f"Driver Version:      {DRIVER}"))
    print(full(f"Nic Driver Version:  {DRIVER}"))
    print(rule)
    print("| AIP  Name        Persistence-M| Bus-Id        Disp.A | Volatile Uncor-Events|")
    print("| Fan  Temp  Perf  Pwr:Usage/Cap|         Memory-Usage | AIP-Util  Compute M. |")
    print("|===============================+======================+======================|")
    for index, module in enumerate(modules):
        busy = holder(module) is not None
        heat, watts = (BUSY_CELSIUS, BUSY_WATTS) if busy else (IDLE_CELSIUS, IDLE_WATTS)
        memory = f"{_used(module) // MIB}MiB / {settings().memory // MIB}MiB"
        print(f"|{index:4d}  HL-225              N/A  | {_bus(module):<20} |{0:20d}  |")
        print(f"| N/A  {heat:3d}C   N/A  {watts:4d}W / {MAX_WATTS}W | {memory:>20} | {100 * busy:5d}%{'Default':>13} |")
        print(rule)
    print("| Compute Processes:                                               AIP Memory |")
    print("|  AIP       PID   Type   Process name                             Usage      |")
    print("|" + "=" * (WIDTH - 1) + "|")
    for index, module in enumerate(modules):
        pid = holder(module)
        text = "N/A       N/A    N/A    N/A" if pid is None else f"{pid:<9} C      {_used(module) // MIB}MiB"
        print(full(f"  {index}        {text}"))
    print("+" + "=" * (WIDTH - 1) + "+")


if __name__ == "__main__":
    sys.exit(main())
