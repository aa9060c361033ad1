"""The events of a schedule and its decisions, so that those of a real run can be repeated elsewhere.

    python -m gaudi_batch.scheduling.event_log events.bin

replays a log and says where this version decides otherwise.
"""

from __future__ import annotations

import io
import pickle
import sys
import zlib
from collections import deque
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from gaudi_batch.plan import Shard
from gaudi_batch.scheduling.decisions import Decision
from gaudi_batch.scheduling.events import Event
from gaudi_batch.scheduling.schedule import Schedule

MAX_EVENTS = 10_000
"""Events after which a new snapshot is taken. A log keeps at least so many, if there were as many, and at most twice as
many."""
VERSION = 5
"""Version of the format that `EventLog.dump` writes."""
PACKAGES = ("gaudi_batch.scheduling.", "gaudi_batch.plan")
"""The packages whose classes a log may hold: it is data, and nothing else is loaded from it."""
BUILTINS = {
    ("builtins", "frozenset"),
    ("builtins", "range"),
    ("builtins", "set"),
    ("collections", "Counter"),
    ("collections", "deque"),
}


@dataclass(frozen=True)
class Entry:
    """An event, and the decisions on it."""

    event: Event
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class Difference:
    """Where a schedule decides otherwise than the log says."""

    number: int
    """Number of the event, counted from the snapshot."""
    event: Event
    logged: tuple[Decision, ...]
    decided: tuple[Decision, ...]


class EventLog:
    """A schedule whose events are kept in memory: a snapshot, and all events since.

    Args:
        schedule: tells it everything through this log alone.
        max_events: events after which a new snapshot is taken.
    """

    def __init__(self, schedule: Schedule, max_events: int = MAX_EVENTS) -> None:
        self.schedule = schedule
        self._max_events = max_events
        self._parts: deque[tuple[bytes, list[Entry]]] = deque(maxlen=2)
        self._begin_part()

    def handle(self, event: Event) -> list[Decision]:
        """See `Schedule.handle`."""
        if len(self._entries) >= self._max_events:
            self._begin_part()
        decisions = self.schedule.handle(event)
        self._entries.append(Entry(event, tuple(decisions)))
        return decisions

    def dump(self) -> bytes:
        """The oldest snapshot that is kept and all events since, in the form that `load` reads."""
        entries = [entry for _, part in self._parts for entry in part]
        content = (VERSION, list(self.schedule.shards.values()), self._parts[0][0], entries)
        file = io.BytesIO()
        _Data(file).dump(content)
        return zlib.compress(file.getvalue())

    def _begin_part(self) -> None:
        self._entries: list[Entry] = []
        self._parts.append((_snapshot(self.schedule), self._entries))


def load(data: bytes) -> tuple[Schedule, list[Entry]]:
    """Reads what `EventLog.dump` wrote: the schedule at the snapshot, and the events since.

    Raises:
        ValueError: it is no such log, or holds anything but data of this package.
    """
    try:
        version, shards, snapshot, entries = _DataOnly(io.BytesIO(zlib.decompress(data))).load()
        if version != VERSION:
            raise ValueError(f"its version is {version!r:.20}, and this one reads {VERSION}")
        schedule = _DataOnly(io.BytesIO(snapshot), {shard.number: shard for shard in shards}).load()
    except (zlib.error, pickle.UnpicklingError, EOFError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(f"no event log of a schedule: {error}") from None
    return schedule, entries


def replay(data: bytes) -> tuple[int, list[Difference]]:
    """Tells the schedule of a log the log's events; returns how many there were, and the first difference in its
    decisions, if there is one. What follows a difference means nothing.

    Raises:
        ValueError: see `load`.
    """
    schedule, entries = load(data)
    for number, entry in enumerate(entries):
        decided = tuple(schedule.handle(entry.event))
        if decided != entry.decisions:
            return len(entries), [Difference(number, entry.event, entry.decisions, decided)]
    return len(entries), []


class _Data(pickle.Pickler):
    """Writes data that `_DataOnly` reads."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)

    def reducer_override(self, obj: Any) -> Any:
        # By its value: Python 3.11.0 to 3.11.3 would write a call of `getattr`.
        return (type(obj), (obj.value,)) if isinstance(obj, Enum) else NotImplemented


class _Snapshots(_Data):
    """Writes a schedule without its shards, which never change and may be a million."""

    def __init__(self, file: io.BytesIO, shards: object) -> None:
        super().__init__(file)
        self._shards = shards

    def persistent_id(self, obj: Any) -> Any:
        if obj is self._shards:
            return "shards"
        return obj.number if type(obj) is Shard else None


class _DataOnly(pickle.Unpickler):
    """Reads data of this package, and runs no code that the data brings along."""

    def __init__(self, file: io.BytesIO, shards: dict[int, Shard] | None = None) -> None:
        super().__init__(file)
        self._shards = shards or {}

    def persistent_load(self, pid: Any) -> Any:
        return self._shards if pid == "shards" else self._shards[pid]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in BUILTINS and not module.startswith(PACKAGES):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a schedule")
        kind = super().find_class(module, name)
        if not isinstance(kind, type):
            raise pickle.UnpicklingError(f"{module}.{name} is no class")
        return kind


def _snapshot(schedule: Schedule) -> bytes:
    file = io.BytesIO()
    _Snapshots(file, schedule.shards).dump(schedule)
    return file.getvalue()


def main(arguments: list[str]) -> int:
    """Replays the log of a file; returns 0 if all decisions are the same, 1 if not, 2 if it is no log."""
    if len(arguments) != 1:
        print("usage: python -m gaudi_batch.scheduling.event_log events.bin", file=sys.stderr)
        return 2
    try:
        count, differences = replay(Path(arguments[0]).read_bytes())
    except (OSError, ValueError) as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return 2
    for difference in differences:
        print(f"event {difference.number} of {count}: {difference.event}")
        print(f"  logged:  {list(difference.logged)}")
        print(f"  decided: {list(difference.decided)}")
    if not differences:
        print(f"{count} events, all decisions the same")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
