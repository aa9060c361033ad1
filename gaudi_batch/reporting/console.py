"""Standard output and standard error as the commands use them, whatever has become of the two.

What a command prints is what it was called for, so it hears of it when that can't be written (`OutputLost`). Log lines
stand beside the work: one that standard error can't take is lost, and nothing else is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from typing import Any, TextIO

from gaudi_batch.errors import GaudiBatchError


class OutputLost(GaudiBatchError):
    """Standard output can't be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output can't be written: {error.strerror}")
        self.closed = error.errno == errno.EPIPE
        """Whether its reader has closed it, as `head` does once it has what it wants."""


def open_streams() -> None:
    """Makes sure that standard input, output and error exist and take every character.

    The system gives the number of one that is closed to the next file that is opened, and a library that writes to
    standard error would write into an image.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the file gets the lowest free number
            os.set_inheritable(number, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        with contextlib.suppress(AttributeError):  # code that has replaced the stream knows what that takes
            getattr(sys, name).reconfigure(errors="backslashreplace")


def say(text: str, end: str = "\n") -> None:
    """Prints a result of a command. Raises OutputLost."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise OutputLost(error) from None


def require_reader() -> None:
    """Raises OutputLost if standard output is a pipe that nobody reads any more, even if there is nothing to write."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if poll.poll(0):
        raise OutputLost(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


class LossyStream:
    """A text stream that drops what it can't write, as when a disk is full or a terminal is gone.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or drops it."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
