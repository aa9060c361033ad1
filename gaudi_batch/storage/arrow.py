"""Storage as a file system of Arrow, whose threads read from it.

A thread of Arrow that needs Python while the process ends aborts the process, or hangs it: when it reads, or frees what
Python has read. So files of a disk and small objects are read without Python once they are open, and the end of the
process waits until no thread is at a large object. Who reads in a daemon thread while the process ends is not safe.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

WHOLE_BYTES = 1 << 19
"""Bytes up to which an object is read whole when it is opened: manifests of shards are that small. Of others that is
read which is asked for."""
QUIET_S = 0.05
"""Seconds without a call after which the threads of Arrow have ended."""
OPEN_S = 1.0
"""The same while files are open, as of a dataset that was left half read."""
EXIT_TIMEOUT_S = 30.0
"""Seconds for which the end of the process waits at most, as for a store that does not answer."""


def arrow_filesystem(filesystem: Any) -> pyarrow.fs.FileSystem:
    """An fsspec filesystem for pyarrow to read from."""
    if isinstance(filesystem, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(_Handler(filesystem))


class _Handler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    def open_input_file(self, path: str) -> pa.NativeFile:
        with _calls.one():
            if self.fs.size(path) <= WHOLE_BYTES:
                return pa.BufferReader(_copied(self.fs.cat_file(path)))
            return pa.PythonFile(_File(self.fs.open(path, mode="rb")), mode="r")

    open_input_stream = open_input_file


class _File:
    """A large object that is open."""

    def __init__(self, file: Any) -> None:
        self._file = file
        _open[id(self)] = self

    def read(self, size: int = -1) -> bytes:
        with _calls.one():
            return self._file.read(size)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _copied(data: bytes) -> pa.Buffer:
    """The same in memory of Arrow, which is freed without Python."""
    memory = pa.BufferOutputStream()
    memory.write(data)
    return memory.getvalue()


class _Calls:
    """Calls by threads of Arrow."""

    def __init__(self) -> None:
        self._is_over = False
        self.forget()

    def forget(self) -> None:
        """Forgets all calls: a forked process has no threads but its own."""
        self._lock = threading.Lock()
        self._begun = self._running = 0
        _open.clear()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """While it is entered, a call goes on. Raises OSError once the process ends, so that none follows it."""
        with self._lock:
            if self._is_over:
                raise OSError("the process ends")
            self._begun += 1
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def end(self) -> None:
        """Waits until no call goes on and what they have opened is closed."""
        self._is_over = True
        if not self._begun:
            return
        since = began = time.monotonic()
        while (now := time.monotonic()) - began < EXIT_TIMEOUT_S:
            if self._running:
                since = now
            elif now - since >= (OPEN_S if _open else QUIET_S):
                return
            time.sleep(0.01)


_open: WeakValueDictionary[int, _File] = WeakValueDictionary()
_calls = _Calls()
atexit.register(_calls.end)
os.register_at_fork(after_in_child=_calls.forget)
