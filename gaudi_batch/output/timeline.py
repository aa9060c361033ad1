"""timeline/<driver>-<number>.jsonl: what became of each card, one line each time that it changed. The last file grows
until it is `MAX_BYTES` large.

Number 0 has no line: it is there from before the driver's first attempt, so that a later driver knows whose attempts
are over. With the throughput lines, which say when each batch began and how long it took, this is what each card did
and when: loading, capturing, generating, waiting, faults and backup attempts.
"""

from __future__ import annotations

import json
import threading
from datetime import datetime, timedelta, timezone
from typing import Any

from gaudi_batch.layout import timeline_path
from gaudi_batch.output.ledger import Ledger

MAX_BYTES = 1 << 16
"""Bytes from which on a file is not added to."""


class Timeline:
    """The lines of one driver.

    Args:
        ledger: of the run.
        driver: its name.
    """

    def __init__(self, ledger: Ledger, driver: str) -> None:
        self._ledger = ledger
        self._driver = driver
        self._lines: list[str] = []
        self._number = 1
        self._file = b""
        self._lock = threading.Lock()
        self._writing = threading.Lock()

    def begin(self) -> None:
        """Stores number 0. Raises LeaseLost or StorageError."""
        self._ledger.put(timeline_path(self._driver, 0), b"")

    def note(self, slot: int, card: str, what: str, ago_s: float = 0.0, **more: Any) -> None:
        """Adds a line, with a time by the driver's clock.

        Args:
            slot: number of the card's place in the cluster, among those of its driver.
            card: its name, as in throughput lines; empty before its first process has loaded.
            what: `starting` (a process is started, and then loads), `ready` (`load_s`, `module` and `node`), `fault`
                (`error`), `quarantined` (`error`), `released` (its place is given back; with `node_gone` if its node
                has gone), `backup` (it begins a second `attempt` at a `shard` of which `backup_of` is the first),
                `dropped` (it ends an `attempt`), `works` (it was idle and has work; a card that becomes ready is idle),
                `idle` (it has none left), or `over` (the driver ends; `phase` and `phase_s` say what the card was at,
                and for how many seconds).
            ago_s: seconds since it happened.
            more: other fields of the line.
        """
        when = datetime.now(timezone.utc) - timedelta(seconds=ago_s)
        time = when.isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "slot": slot, "card": card, "what": what, **more}, separators=(",", ":"))
        with self._lock:
            self._lines.append(line)

    def write(self) -> None:
        """Stores the lines that are new; those of a try that failed come with the next one.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed.
        """
        with self._writing:
            with self._lock:
                lines = list(self._lines)
            if lines:
                file = self._file + "".join(f"{line}\n" for line in lines).encode()
                self._ledger.put(timeline_path(self._driver, self._number), file)
                is_full = len(file) >= MAX_BYTES
                self._number, self._file = (self._number + 1, b"") if is_full else (self._number, file)
                with self._lock:
                    del self._lines[: len(lines)]
