"""A file of prompts, and what it is known by."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.storage.listing import mark_of
from gaudi_batch.storage.store import Storage

TAIL_BYTES = 1 << 16
"""Bytes that are read of a file's end at first; most footers are smaller."""


@dataclass(frozen=True)
class PromptFile:
    """A Parquet file of the dataset."""

    name: str
    """Path below the dataset's base directory."""
    rows: int
    first_row: int
    """Its first row's number over all files in sorted order."""
    identity: str
    """Changes when the file does: its size, its footer's SHA-256, and the store's own mark of its version (an ETag,
    or the time of the last change), which also changes when the file is copied or touched."""
    groups: tuple[int, ...] = ()
    """Rows of each of its row groups."""
    footer: bytes = field(default=b"", compare=False, repr=False)
    """Its footer as planned, with the file's last 8 bytes; empty if whoever reads the file must read that, too."""

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return int(self.identity.split()[0])

    @property
    def metadata(self) -> pq.FileMetaData | None:
        """What its footer says; None without one."""
        return parse_footer(self.footer).metadata if self.footer else None

    def group_of(self, row: int) -> int:
        """The row group of a row that is counted in the file."""
        return bisect_right(list(itertools.accumulate(self.groups)), row)


def content(identity: str) -> str:
    """The part of an identity that depends on the file's content: its size and its footer's SHA-256."""
    return ", ".join(identity.split(", ")[:2])


def identity_of(info: Mapping[str, Any], footer: bytes) -> str:
    """A file's identity, from its footer and what its store says of it; see `PromptFile`."""
    return f"{size_mark(info)}, footer {_digest(footer)}, {mark_of(info)}"


def size_mark(info: Mapping[str, Any]) -> str:
    """The part of an identity that is the file's size."""
    return f"{int(info['size'] or 0)} bytes"


def read_footer(storage: Storage, name: str, size: int) -> bytes:
    """The footer of a Parquet file of so many bytes, with the file's last 8 bytes.

    Raises:
        ArrowInvalid: the file does not end as a Parquet file does.
        StorageError: the store failed.
    """
    tail = storage.get_range(name, max(0, size - TAIL_BYTES), size)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise pa.ArrowInvalid("it does not end as a Parquet file does")
    if length > len(tail):
        tail = storage.get_range(name, size - length, size)
    return tail[-length:]


def parse_footer(footer: bytes) -> pq.ParquetFile:
    """A footer alone, which is a readable Parquet file as long as no column is read. Raises ArrowException or
    OSError."""
    return pq.ParquetFile(pa.BufferReader(b"PAR1" + footer))


def is_footer_of(identity: str, footer: bytes) -> bool:
    """Whether a file's identity tells of this footer."""
    return content(identity).endswith(f", footer {_digest(footer)}")


def _digest(footer: bytes) -> str:
    return hashlib.sha256(footer).hexdigest()[:16]
