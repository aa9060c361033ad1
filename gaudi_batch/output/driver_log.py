"""log/<driver>-<number>.log: what a driver has logged.

Stores can't append, so the last piece is written anew each time; once it has `PIECE_BYTES` the next one begins. Lines
that are not stored yet are kept in memory, up to `MAX_PIECES` pieces of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gaudi_batch.layout import log_path

PIECE_BYTES = 1 << 20
MAX_PIECES = 8
"""Pieces that are kept while storage takes none; of more, the oldest is dropped, and the log says so."""


@dataclass
class _Piece:
    number: int
    data: bytearray = field(default_factory=bytearray)
    stored: int = 0
    """Bytes that storage has."""


class DriverLog:
    """The log of one driver. Its methods may be called in any thread.

    Args:
        driver: its name.
    """

    def __init__(self, driver: str) -> None:
        self._driver = driver
        self._pieces = deque([_Piece(1)])
        self._lock = threading.Lock()

    def add(self, line: str) -> None:
        """Adds a line."""
        data = f"{line}\n".encode("utf-8", "backslashreplace")
        with self._lock:
            last = self._pieces[-1]
            if last.data and len(last.data) + len(data) > PIECE_BYTES:
                last = self._begin_piece(last.number + 1)
            last.data += data

    def write(self, put: Callable[[str, bytes], None]) -> None:
        """Stores what is new.

        Args:
            put: writes an object; what it raises is raised, and what it did not take comes with the next call.
        """
        with self._lock:
            pieces = list(self._pieces)
        for piece in pieces:
            with self._lock:
                data = bytes(piece.data)
            if len(data) > piece.stored:
                put(log_path(self._driver, piece.number), data)
                piece.stored = len(data)
        with self._lock:
            while len(self._pieces) > 1 and self._pieces[0].stored == len(self._pieces[0].data):
                self._pieces.popleft()

    def _begin_piece(self, number: int) -> _Piece:
        piece = _Piece(number)
        if len(self._pieces) == MAX_PIECES:
            lost = self._pieces.popleft().data.count(b"\n")
            piece.data += f"({lost} earlier lines were dropped: storage has not taken them)\n".encode()
        self._pieces.append(piece)
        return piece
