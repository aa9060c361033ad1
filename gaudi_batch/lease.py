"""Who drives a run: a courtesy that keeps a second driver out. Nothing depends on it for being right.

lease.json names its holder and counts up while the holder lives. It is taken by writing, waiting and reading back. One
that does not count for `STALE_SECONDS` on the observer's own clock is anybody's; so is, at once, one whose process on
this machine is gone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.storage import Storage

log = logging.getLogger("gaudi_batch")

STALE_SECONDS = 60.0
BEAT_SECONDS = 10.0
"""How often the holder counts up."""
LOOK_SECONDS = 2.0
SETTLE_SECONDS = 1.0
"""Between writing and reading back."""


@dataclass(frozen=True)
class Lease:
    """What lease.json says."""

    driver: str
    """The prefix of the holder's attempts."""
    host: str
    machine: str
    """The machine's boot, so that a process number means something."""
    pid: int
    started: str
    """When the process started, in the machine's own ticks."""
    beat: int
    dead: tuple[str, ...]
    """Drivers of this run that are known to be dead, and whose leavings nobody has removed yet."""
    released: bool = False
    """Whether the holder has let go, and left this only to hand the dead on."""

    @property
    def holder(self) -> str:
        """The holder as a person finds it."""
        return f"process {self.pid} on {self.host}"


_LEASE = TypeAdapter(Lease)


class LeaseKeeper:
    """This driver's side of the lease.

    Args:
        storage: the output.
        driver: prefix of this driver's attempts.
    """

    def __init__(self, storage: Storage, driver: str) -> None:
        self._storage = storage
        self._over = threading.Event()
        pid = os.getpid()
        self._lease = Lease(driver, socket.gethostname(), _machine(), pid, _process_started(pid), 0, ())

    @property
    def driver(self) -> str:
        """Prefix of this driver's attempts."""
        return self._lease.driver

    @property
    def dead(self) -> frozenset[str]:
        """Drivers of this run that are known to be dead."""
        return frozenset(self._lease.dead)

    def take(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Takes the lease once nobody else holds it, and keeps counting up until `release`.

        Raises:
            InputError: another driver is alive, or takes the lease at the same time.
        """
        held = self._read()
        if held is not None and held.driver != self._lease.driver:
            alive = False if held.released else is_alive(held)
            if alive:
                raise self._refusal(held)
            if alive is None:
                say(f"{held.holder} drove this run; waiting up to {STALE_SECONDS:.0f} s to see whether it still does")
                self._wait_until_stale(held)
            self._lease = replace(self._lease, dead=(*held.dead, held.driver))
        self._write()
        time.sleep(SETTLE_SECONDS)
        held = self._read()
        if held is not None and held.driver != self._lease.driver:
            raise InputError(f"{self._storage.url}: {held.holder} has just started to drive this run")
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def release(self, cleaned: bool) -> None:
        """Leaves the run without a holder. Where storage fails, the lease is left to grow stale.

        Args:
            cleaned: whether the leavings of the dead have been removed; if not, the next driver is told of them.
        """
        self._over.set()
        _ended.add(self._lease.driver)
        try:
            held = self._read()
            if held is None or held.driver != self._lease.driver:
                return
            if cleaned or not self._lease.dead:
                self._storage.remove("lease.json")
            else:
                self._lease = replace(self._lease, released=True)
                self._write()
        except StorageError as error:
            log.warning("the lease can't be given back: %s", error)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                held = self._read()
                if held is not None and held.driver != self._lease.driver:
                    log.warning("%s drives this run as well now; commits stay right, work is done twice", held.holder)
                    return
                self._write()
            except StorageError as error:
                log.warning("the lease can't be kept up: %s", error)

    def _write(self) -> None:
        self._lease = replace(self._lease, beat=self._lease.beat + 1)
        self._storage.put("lease.json", json.dumps(asdict(self._lease)).encode())

    def _wait_until_stale(self, held: Lease) -> None:
        until = time.monotonic() + STALE_SECONDS
        while time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
            now = self._read()
            if now is None:
                return
            if now != held:
                raise self._refusal(now)

    def _refusal(self, held: Lease) -> InputError:
        return InputError(
            f"{self._storage.url}: {held.holder} drives this run; one output has one driver, so wait for it or stop it"
            " there"
        )

    def _read(self) -> Lease | None:
        return read_lease(self._storage)


_ended: set[str] = set()
"""Drivers of this process that are over, whether or not storage let them say so."""


def read_lease(storage: Storage) -> Lease | None:
    """Who drives the run in an output, as far as is written down."""
    data = storage.get("lease.json")
    if data is None:
        return None
    try:
        return _LEASE.validate_json(data, strict=True)
    except ValueError:
        return None


def is_alive(lease: Lease) -> bool | None:
    """Whether the holder lives, which only its own machine can tell; None on another."""
    if lease.driver in _ended:
        return False
    if lease.machine != _machine():
        return None
    return lease.started == _process_started(lease.pid)


def _machine() -> str:
    # The boot id alone would be the same in two containers, whose process numbers mean different processes.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def _process_started(pid: int) -> str:
    """When a process started; empty if there is none, or if it is dead and waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
