"""`status --watch`: looks at a run again and again until it is over, from its output alone.

While the driver lives, two small objects are read each time, lease.json and progress.json. Only when it is over, all
records are, as `status` does: in a large run their list alone is hundreds of requests.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

from gaudi_batch.errors import StorageError
from gaudi_batch.output.holder import LEASE_TTL_S, Lease, read_lease
from gaudi_batch.output.progress import sane_progress, without_doings
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.reporting.progress_text import progress_fields, progress_line
from gaudi_batch.reporting.status import TIME_LEFT, WATCH_TIMEOUT_S, read_status
from gaudi_batch.storage.retry import begin
from gaudi_batch.text import duration, printable

EXIT_CODES = {"complete": 0, "complete with failed rows": 3}
"""Of a run that has ended so; of any other end 1, as `run` has it."""

ANSWER_S = 5.0
"""Seconds for which storage may think before the view says that it does not answer."""


@dataclass(frozen=True)
class Seen:
    """A run as one look has seen it."""

    output: str
    state: str
    """`waiting` (there is no run yet), `running` or `silent` (its driver lets nothing be heard, and may be dead)."""
    record: Mapping[str, Any]
    """What progress.json says."""
    notes: tuple[str, ...] = ()
    """What else a person should know."""

    def line(self) -> str:
        """In one line."""
        progress = "" if self.record["time"] is None else f"{progress_line(self.record)}; "
        return printable(f"{progress}{'; '.join((self.state, *self.notes))}")

    def json(self) -> str:
        """As JSON in one line."""
        names = ("cards", "faults", "failures")
        details = {name: self.record[name] for name in names}
        about = {"output": self.output, "state": self.state, "notes": self.notes, "progress_time": self.record["time"]}
        return json.dumps({**about, **progress_fields(self.record), **details})


class Watcher:
    """Looks at the run in an output.

    Args:
        reader: of the output.
    """

    def __init__(self, reader: OutputReader) -> None:
        self._reader = reader
        self._seen = Seen(reader.storage.url, "waiting", sane_progress({}))
        self._sign: tuple[Any, ...] | None = None  # what a driver that lives changes
        self._sign_at = -math.inf  # when that was first seen
        self._renewed = False  # whether it has been seen to change
        self._failing_since: float | None = None
        self._any_answer = False

    def ask(self) -> Seen | dict[str, Any]:
        """What is so now, or, once the run is over, its status.

        Raises:
            InputError: what is in the output can't be read.
            StorageError: storage refuses the first look.
        """
        began = time.monotonic()
        try:
            seen = self._judge(began)
        except StorageError as error:
            if error.refused and not self._any_answer:
                raise
            self._failing_since = began if self._failing_since is None else self._failing_since
            failing = f"storage has failed for {duration(time.monotonic() - self._failing_since)}, and is asked again"
            return Seen(self._seen.output, self._seen.state, self._seen.record, (f"{failing}: {error}",))
        self._any_answer, self._failing_since = True, None
        if (took := time.monotonic() - began) > ANSWER_S:
            self._sign_at += took  # the driver may have waited for storage, too
        if isinstance(seen, Seen):
            self._seen = seen
        return seen

    def unanswered(self, seconds: float) -> Seen:
        """What was so before storage was asked, so many seconds ago."""
        return dataclasses.replace(self._seen, notes=(f"storage has not answered for {duration(seconds)}",))

    def _judge(self, now: float) -> Seen | dict[str, Any]:
        lease, written = read_lease(self._reader.storage), self._reader.get_json("progress.json") or {}
        record = sane_progress(written)
        silent_s = 0.0 if lease is None else self._silence(now, lease.driver, lease.beat, record["time"])
        if lease is None or self._is_over(lease, silent_s):
            if self._reader.storage.get("run.json") is None:
                return self._state("waiting", "there is no run here yet (no run.json)")
            status = read_status(self._reader, 0.0)
            if status["state"] != "running":
                return status
        if lease is not None and _driver_of(written) not in (None, lease.driver):
            record = _without_driver(record)
            return self._state("running", "its driver is starting; the figures are those of the driver before", record)
        if record["time"] is None:
            return self._state("running", "its driver is starting", record)
        if written.get("state") == "over":
            return self._state("running", "makes no more images, and sums up", _without_driver(record))
        if lease is not None and silent_s > WATCH_TIMEOUT_S:
            note = f"its driver, {lease.holder}, has not been heard of for {duration(silent_s)}, and may be dead"
            return self._state("silent", note, record)
        return self._state("running", "", record)

    def _state(self, state: str, note: str, record: Mapping[str, Any] | None = None) -> Seen:
        notes = (note,) if note else ()
        return Seen(self._seen.output, state, self._seen.record if record is None else record, notes)

    def _silence(self, now: float, *sign: Any) -> float:
        """Seconds for which the driver has written nothing, as far as storage could be asked."""
        if sign != self._sign:
            self._renewed = self._sign is not None
            self._sign, self._sign_at = sign, now
        elif self._failing_since is not None:
            self._sign_at = now
        return now - self._sign_at

    def _is_over(self, lease: Lease, silent_s: float) -> bool:
        if lease.released:
            return True
        alive = lease.is_alive()
        return not alive if alive is not None else silent_s > (LEASE_TTL_S if self._renewed else WATCH_TIMEOUT_S)


def _driver_of(written: Mapping[str, Any]) -> Any:
    """The driver that wrote a progress.json; None if an older version did."""
    try:
        return written["drivers"][-1]["driver"]
    except (KeyError, IndexError, TypeError):
        return None


def _without_driver(record: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a record when its driver makes no images."""
    return {
        **record,
        **dict.fromkeys((*TIME_LEFT, "images_per_s", "waits_for")),
        "cards": without_doings(record["cards"]),
    }


def watch(watcher: Watcher, show: Callable[[Seen], None], interval_s: float) -> dict[str, Any]:
    """Shows a run until it is over; returns its status then.

    Args:
        watcher: looks at it.
        show: is called about once a second with what was seen last.
        interval_s: seconds between two looks.
    """
    while True:
        began = time.monotonic()
        asked, told_s, unanswered = begin(watcher.ask), ANSWER_S, None
        while not wait([asked], 1.0).done:
            if (waited := time.monotonic() - began) > told_s:
                unanswered, told_s = watcher.unanswered(waited), waited + interval_s
            if unanswered is not None:
                show(unanswered)
        seen = asked.result()
        if not isinstance(seen, Seen):
            return seen
        show(seen)
        while (left := interval_s - (time.monotonic() - began)) > 0:
            time.sleep(min(1.0, left))
            show(seen)
