"""What this process did with the device, as numbers and as a file that outlives the process."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass

from habana_frameworks._emulation.settings import settings

FILE_SIZE = 1024
"""Bytes of a counter file: one write of constant length, so that a reader never finds half a number."""


@dataclass
class Counters:
    """Counts since the process began; written to `<state>/counters/<pid>.json` whenever one changes."""

    pid: int = 0
    module: int | None = None
    acquires: int = 0
    captures: int = 0
    replays: int = 0
    mark_steps: int = 0
    fused_attentions: int = 0
    copies: int = 0
    compilations: int = 0
    recipes_loaded: int = 0
    synchronizes: int = 0
    memory_in_use: int = 0
    memory_peak: int = 0
    program: str = ""

    @property
    def launches(self) -> int:
        """How often the device was given work: captures, replays, mark_steps, and in eager mode copies to the host."""
        return self.captures + self.replays + self.mark_steps + self.copies

    def acquired(self, module: int) -> None:
        """The process has taken a module."""
        self.module = module
        self.acquires += 1
        self.write()

    def count(self, name: str) -> None:
        """Adds one to a count."""
        setattr(self, name, getattr(self, name) + 1)
        if self.module is not None:
            self.write()

    def write(self) -> None:
        """Puts the counts in place of the last ones."""
        global _file
        if self.pid != os.getpid():
            self.pid, _file = os.getpid(), None
            self.program = " ".join(getattr(sys, "orig_argv", sys.argv))[:120]
        if _file is None:
            directory = settings().state / "counters"
            directory.mkdir(parents=True, exist_ok=True)
            _file = os.open(directory / f"{self.pid}.json", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.pwrite(_file, json.dumps(asdict(self)).ljust(FILE_SIZE).encode()[:FILE_SIZE], 0)


_file: int | None = None
counters = Counters()


def read_counters() -> list[dict[str, object]]:
    """Counts of every process that used a module of this state directory."""
    found = []
    for path in sorted((settings().state / "counters").glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            found.append(json.loads(path.read_text()))
    return found
