"""Who drives a run. One driver at a time puts manifests, so nothing that is committed is ever written over.

lease.json names its holder, who renews it while it lives. It is taken by writing, waiting and reading back. A lease
that is not renewed for `LEASE_TTL_S` on the observer's own clock may be taken by any driver; one whose process on this
machine has ended may be taken at once. A holder that could not renew it for `RENEW_DEADLINE_S` commits nothing until it
has, and one that finds another's name in it writes nothing any more. A driver checks that it holds the lease right
before all that it writes or removes, and what takes longer goes on no longer than the lease is certain. A write may
still land later. That does no harm: where the store creates conditionally a manifest takes no other's place, a manifest
of another run is no commit, and a driver that does not know what became of a manifest keeps the lease.

A store may answer with what lease.json said a while ago. So the holder ignores the name of a driver that it knows has
ended, and reads a name that is new to it twice before it believes it; a driver reads twice that a holder has ended
before it takes the run.

When the lease is released, lease.json keeps the names of all drivers that have ended, whose uncommitted objects may be
removed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace

from gaudi_batch.errors import InputError, RunStopped, StorageError
from gaudi_batch.layout import TIMELINE, drivers_of_timeline
from gaudi_batch.output.holder import (
    LEASE_TTL_S,
    Lease,
    note_end,
    note_in_doubt,
    process_started,
    read_lease,
    this_machine,
)
from gaudi_batch.storage.store import Storage

log = logging.getLogger(__name__)

RENEW_INTERVAL_S = 10.0
"""Seconds between two renewals by the holder."""
LEASE_POLL_INTERVAL_S = 2.0
"""Seconds between two readings of a lease that another driver holds."""
SETTLE_INTERVAL_S = 1.5
"""Seconds between writing the lease and reading it back."""
REREAD_INTERVAL_S = 1.0
"""Seconds between two readings of what may be an old answer."""
TAKE_TIMEOUT_S = 1.0
"""Seconds for which a try at taking the lease may go on after it was checked that nobody has it. With the interval at
which a write is asked whether it may go on, this is less than `SETTLE_INTERVAL_S`: so of two drivers that take it at
the same moment, the first to write reads the other's name. On storage where that has not been enough for
`LEASE_TIMEOUT_S`, a try may take so long, and is read back as many times later."""
RENEW_DEADLINE_S = 30.0
"""Seconds for which a holder that has renewed the lease may commit. A write under way, however large, is given up
within `RENEW_INTERVAL_S` of that; the rest of `LEASE_TTL_S` is for requests that are still in the network."""
MANIFEST_TIMEOUT_S = 15.0
"""Seconds of one try at putting a manifest, beside those that its size needs."""
LEASE_TIMEOUT_S = 10.0
"""Seconds of one try at reading or writing the lease. A write is not tried for long: landing late, it would say that a
driver lives which may not."""


class LeaseLost(RunStopped):
    """Another driver has taken over the run."""


class LeaseKeeper:
    """This driver's side of the lease.

    Args:
        storage: the output.
        driver: prefix of this driver's attempts.
    """

    def __init__(self, storage: Storage, driver: str) -> None:
        self._storage = storage
        self._over = threading.Event()
        self._kept_up = -math.inf
        self._silent: Lease | None = None  # the holder whose silence alone says that it is over
        self._lost = ""
        self._begun: frozenset[str] = frozenset()  # other drivers that have begun on this output
        self._settle_s = SETTLE_INTERVAL_S
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        pid = os.getpid()
        self._lease = Lease(driver, socket.gethostname(), this_machine(), pid, process_started(pid), 0, ())

    @property
    def driver(self) -> str:
        """Prefix of this driver's attempts."""
        return self._lease.driver

    @property
    def past_holders(self) -> frozenset[str]:
        """Drivers of this run that are over, also those that no lease names any more."""
        return frozenset(self._lease.dead) | self._begun

    @property
    def follows_silent(self) -> bool:
        """Whether the driver before this one has only fallen silent, so that its process may go on for a while."""
        return self._silent is not None

    def take(
        self, say: Callable[[str], None] = lambda line: None, meanwhile: Callable[[], object] = lambda: None
    ) -> None:
        """Takes the lease once nobody else holds it, and renews it until `release`.

        Args:
            say: is told what is waited for.
            meanwhile: is called while a driver that takes the lease at the same moment would show itself; may raise.

        Raises:
            InputError: another driver is alive, or takes the lease at the same time.
            LeaseLost: another driver has taken the lease since.
            StorageError: storage failed.
        """
        while not self._take(self._wait_until_over(say)):
            pass
        settled = time.monotonic() + self._settle_s
        self._renewing.start()  # the next steps may take as long as `storage_patience`
        meanwhile()
        time.sleep(max(0.0, settled - time.monotonic()))
        other = self._other_holder(self._storage)
        if other is not None:
            self.forget()
            raise InputError(f"{self._storage.url}: {other.holder} has just started to drive this run")
        try:
            self._storage.find_out_create("lease.json", self._data(), self.ensure_held, self.holds)
        except (StorageError, LeaseLost):
            self.forget()
            raise

    def _take(self, held: Lease | None) -> bool:
        """Writes this driver's lease after one that is over; returns whether it did, and no other driver before."""

        def require_over() -> None:
            now = self._read()
            if now is not None and now.driver != self.driver and (held is None or not now.is_before(held)):
                raise _Overtaken

        if held is not None:
            self._lease = replace(self._lease, dead=(*held.dead, held.driver))
        self._begun = frozenset(drivers_of_timeline(self._storage.names(TIMELINE)) - {self.driver})
        try:
            took_s = self._write(self._storage, require_over, TAKE_TIMEOUT_S)
        except _Overtaken:
            return False
        self._settle_s = SETTLE_INTERVAL_S * took_s / TAKE_TIMEOUT_S
        return True

    def ensure_held(self) -> None:
        """Returns when this driver may commit: it drives the run, and will for longer than a commit takes.

        Raises:
            LeaseLost: another drives it.
            StorageError: that could not be found out for as long as `storage_patience`.
        """
        since = time.monotonic()
        while True:
            if self._over.is_set():
                raise LeaseLost("this driver is over")
            failed = StorageError(f"{self._storage.url}: the lease can't be kept up")
            try:
                self._check_holder()
                if time.monotonic() - self._kept_up < RENEW_DEADLINE_S:
                    return
            except StorageError as error:
                failed = error
            if failed.refused or time.monotonic() - since > self._storage.retry_timeout_s:
                raise failed
            self._over.wait(LEASE_POLL_INTERVAL_S / 4)

    def holds(self) -> bool:
        """Whether a write that `ensure_held` admitted may go on."""
        certain = time.monotonic() - self._kept_up < RENEW_DEADLINE_S
        return certain and not self._lost and not self._over.is_set()

    def release(self, settled: Callable[[], bool] = lambda: True) -> None:
        """Gives the lease back. If storage fails, the lease is left to become stale.

        Args:
            settled: asked when `ensure_held` admits no more writes; if False, the lease is left to become stale, too.
        """
        if self._over.is_set():
            return
        self.forget(settled)
        if self._renewing.ident is None or not settled():
            return  # the lease was not taken, or a write that it guards is still under way
        if self._renewing.is_alive():
            self._renewing.join()  # a renewal after this would overwrite what it says
        try:
            self._lease = replace(self._lease, released=True)
            self._write(self._quick, self._check_holder, LEASE_TIMEOUT_S)
        except LeaseLost:
            return
        except StorageError as error:
            log.warning("the lease can't be given back: %s", error)

    def forget(self, settled: Callable[[], bool] = lambda: True) -> None:
        """Ends this driver's hold without writing, as if its process ended; `settled` is as in `release`."""
        self._over.set()
        if not settled():
            note_in_doubt(self.driver)
        note_end(self.driver)

    def _renew(self) -> None:
        pause = RENEW_INTERVAL_S
        while not self._over.wait(pause):
            try:
                self._write(self._quick, self._check_holder, LEASE_TIMEOUT_S)
                pause = RENEW_INTERVAL_S
            except LeaseLost:
                return
            except StorageError as error:
                pause = LEASE_POLL_INTERVAL_S
                log.warning("the lease can't be kept up: %s", error)

    def _check_holder(self) -> None:
        """Raises LeaseLost if another driver has taken the lease, StorageError if that can't be read."""
        other = None if self._lost else self._other_holder(self._quick)
        if other is not None:
            self._lost = f"{other.holder} drives this run now, and one output has one driver"
        if self._lost:
            raise LeaseLost(self._lost)

    def _other_holder(self, storage: Storage) -> Lease | None:
        """The driver that has taken the lease since this one did, if any; it must be read twice, a moment apart."""
        held = read_lease(storage)
        if held is None or self._is_old(held):
            return None
        time.sleep(REREAD_INTERVAL_S)
        held = read_lease(storage)
        return None if held is None or self._is_old(held) else held

    def _is_old(self, held: Lease) -> bool:
        """Whether this is an old answer: this driver's own lease, or that of a driver that is over. A lease that was
        taken for over and was renewed since is not old."""
        if self._silent is not None and held.driver == self._silent.driver:
            return held.beat <= self._silent.beat or held.released
        return held.driver in (self._lease.driver, *self._lease.dead)

    def _write(self, storage: Storage, before: Callable[[], None], seconds: float) -> float:
        """Writes the lease. Before each try `before` checks whether that may be, and a try that does not end so many
        seconds after is given up: landing late, it would take the lease from another. Returns for how long the last try
        might have gone on."""
        first, checked = time.monotonic(), -math.inf

        def check() -> None:
            nonlocal checked, seconds
            checked, began = -math.inf, time.monotonic()
            if began - first > LEASE_TIMEOUT_S:
                seconds = LEASE_TIMEOUT_S
            before()
            checked = began

        def is_fresh() -> bool:
            return time.monotonic() - checked < seconds

        self._lease = replace(self._lease, beat=self._lease.beat + 1, renewed_s=time.monotonic())
        try:
            storage.put("lease.json", self._data(), check, is_fresh, LEASE_TIMEOUT_S)
            self._kept_up = checked
            return seconds
        finally:
            checked = -math.inf  # for what is left behind of a try that did not end

    def _data(self) -> bytes:
        return json.dumps(asdict(self._lease)).encode()

    def _read_whole(self, say: Callable[[str], None]) -> Lease | None:
        """Reads the lease. One that can't be read is waited for as long as a stale one: a living holder writes it
        anew."""
        since, first = time.monotonic(), True
        while (held := self._read()) is None and self._storage.get("lease.json") is not None:
            if first:
                say(f"lease.json can't be read; waiting up to {LEASE_TTL_S:.0f} s to see whether a driver writes it")
            if time.monotonic() - since > LEASE_TTL_S:
                break
            first = False
            time.sleep(LEASE_POLL_INTERVAL_S)
        return held

    def _wait_until_over(self, say: Callable[[str], None]) -> Lease | None:
        """The last lease of another driver, once that driver is over; None if there is none. It is read twice, since
        the first answer may be an old one. Raises InputError."""
        held = self._read_whole(say)
        while held is not None and held.driver != self._lease.driver:
            alive = False if held.released else held.is_alive()
            if alive:
                raise self._refusal(held)
            if alive is None:
                say(f"{held.holder} drove this run; waiting up to {LEASE_TTL_S:.0f} s to see whether it still does")
                last = self._wait_until_stale(held)
                if not last.released:
                    self._silent = last
                    return last
                held = last
            time.sleep(REREAD_INTERVAL_S)
            now = self._read()
            if now is None or now.is_before(held):
                return held
            held = now
        return None

    def _wait_until_stale(self, held: Lease) -> Lease:
        """Waits for a holder to renew the lease or to give it back; returns the last lease read. Raises InputError."""
        seen = time.monotonic()
        while True:
            time.sleep(LEASE_POLL_INTERVAL_S)
            looked = time.monotonic()
            now = self._read()
            if now is not None and not now.is_before(held):
                if now.released:
                    return now
                raise self._refusal(now)
            if looked - seen > LEASE_TTL_S:
                return held

    @property
    def _quick(self) -> Storage:
        """The output, for operations that are not tried for long."""
        quick = self._storage.at(self._storage.root)
        quick.retry_timeout_s = quick.try_timeout_s = LEASE_TIMEOUT_S
        return quick

    def _refusal(self, held: Lease) -> InputError:
        return InputError(
            f"{self._storage.url}: {held.holder} drives this run; one output has one driver, so wait for it or stop it"
            " there"
        )

    def _read(self) -> Lease | None:
        return read_lease(self._storage)


class _Overtaken(Exception):
    """Another driver has taken the lease meanwhile."""
