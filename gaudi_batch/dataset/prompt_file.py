"""A file of prompts, and what it is known by."""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from gaudi_batch.storage.listing import mark_of


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
    footer: pq.FileMetaData | None = field(default=None, compare=False, repr=False)
    """Its footer as planned; None if whoever reads the file must read the footer, too."""

    @property
    def size(self) -> int:
        """Its bytes."""
        return int(self.identity.split()[0])

    def group_of(self, row: int) -> int:
        """The row group of a row that is counted in the file."""
        return bisect_right(list(itertools.accumulate(self.groups)), row)


def content(identity: str) -> str:
    """The part of an identity that depends on the file's content: its size and its footer's SHA-256."""
    return ", ".join(identity.split(", ")[:2])


def identity_of(info: Mapping[str, Any], footer: bytes) -> str:
    """A file's identity, from its footer and what its store says of it; see `PromptFile`."""
    return f"{size_mark(info)}, footer {hashlib.sha256(footer).hexdigest()[:16]}, {mark_of(info)}"


def size_mark(info: Mapping[str, Any]) -> str:
    """The part of an identity that is the file's size."""
    return f"{int(info['size'] or 0)} bytes"
