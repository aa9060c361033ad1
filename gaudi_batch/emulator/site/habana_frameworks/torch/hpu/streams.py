"""Streams and events: the emulated device has finished whatever it was given."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from habana_frameworks._emulation import modules
from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.tensor import recorder


class Stream:
    """A queue of work of the device."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        modules.acquire()

    def synchronize(self) -> None:
        """Waits for the queue to empty."""
        counters.count("synchronizes")

    def query(self) -> bool:
        """Whether the queue is empty."""
        return True

    def wait_stream(self, stream: Stream) -> None:
        """Lets later work wait for what another queue holds now."""

    def wait_event(self, event: Event) -> None:
        """Lets later work wait for an event."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event that happens when the queue gets there."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A point in a queue."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Puts the event at the end of a queue."""
        self._time = time.perf_counter()

    def query(self) -> bool:
        """Whether the event has happened."""
        return True

    def synchronize(self) -> None:
        """Waits for the event."""

    def wait(self, stream: Stream | None = None) -> None:
        """Lets later work of a stream wait for the event."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to another."""
        if self._time is None or end._time is None:
            raise RuntimeError("both events must be recorded before their distance is asked")
        return (end._time - self._time) * 1000


_local = threading.local()
_default: Stream | None = None


def default_stream(device: Any = None) -> Stream:
    """The stream that is used unless another is chosen."""
    global _default
    if _default is None:
        _default = Stream()
    return _default


def current_stream(device: Any = None) -> Stream:
    """The stream that this thread uses."""
    return getattr(_local, "stream", None) or default_stream()


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Uses a stream in this thread; an error that leaves it gives up the graph that is being captured on it."""
    before = getattr(_local, "stream", None)
    _local.stream = chosen
    try:
        yield
    except BaseException:
        recorder.active = None
        raise
    finally:
        _local.stream = before


def set_stream(chosen: Stream) -> None:
    """Uses a stream in this thread from here on."""
    _local.stream = chosen


def synchronize(device: Any = None) -> None:
    """Waits for the device."""
    modules.acquire()
    counters.count("synchronizes")
