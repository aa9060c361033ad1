"""lease.json: which driver holds a run, and whether its process lives."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from gaudi_batch.storage.store import Storage

LEASE_TTL_S = 60.0
"""Seconds without a renewal after which another driver may take the lease."""


@dataclass(frozen=True)
class Lease:
    """The content of lease.json."""

    driver: str
    """The prefix of the holder's attempts."""
    host: str
    machine: str
    """The machine's boot, since a process number means something only within it."""
    pid: int
    started: str
    """When the process started, in ticks of the machine's clock."""
    beat: int
    dead: tuple[str, ...]
    """Drivers of this run before this one. They are over, so their uncommitted files may be removed."""
    released: bool = False
    """Whether the holder has let go."""
    renewed_s: float | None = None
    """When it was written, in seconds of the machine's monotonic clock; None in what an older version has written."""

    @property
    def holder(self) -> str:
        """The holder, in words for a person."""
        return f"process {self.pid} on {self.host}"

    def is_before(self, other: Lease) -> bool:
        """Whether this is the other one or came before it."""
        return self.beat <= other.beat if self.driver == other.driver else self.driver in other.dead

    def is_alive(self) -> bool | None:
        """Whether the holder's process lives and renews it; None if that can't be told here and now: on another
        machine, or of a process that lives and has not renewed it for `LEASE_TTL_S`."""
        if self.driver in _ended:
            return None if self.driver in _in_doubt else False
        if self.machine != this_machine():
            return None
        if self.started != process_started(self.pid):
            return False
        return True if self.renewed_s is None or time.monotonic() - self.renewed_s < LEASE_TTL_S else None


_LEASE = TypeAdapter(Lease)
_ended: set[str] = set()
"""Drivers of this process that are over, whether or not storage let them write so."""
_in_doubt: set[str] = set()
"""Those of them of which a write may still land."""


def read_lease(storage: Storage) -> Lease | None:
    """The lease in an output; None if there is none that can be read."""
    data = storage.get("lease.json")
    if data is None:
        return None
    try:
        return _LEASE.validate_json(data, strict=True)
    except ValueError:
        return None


def note_end(driver: str) -> None:
    """Notes that a driver of this process is over."""
    _ended.add(driver)


def note_in_doubt(driver: str) -> None:
    """Notes that a write of a driver of this process that is over may still land."""
    _in_doubt.add(driver)


def this_machine() -> str:
    """This machine and its boot."""
    # The boot id alone would be the same in two containers, whose process numbers mean different processes.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def process_started(pid: int) -> str:
    """When a process started; empty if there is none, or if it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
