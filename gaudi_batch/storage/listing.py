"""What a listing says of an object: enough to notice that another has taken its place."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

_MARKS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "blob_id", "LastModified", "mtime")
_MD5_DIGITS = 32


class Entry(NamedTuple):
    """An object in a listing."""

    size: int
    """Bytes."""
    mark: str
    """The store's own mark of its version, such as an ETag; on a disk the time of the last change."""


def mark_of(info: Mapping[str, Any]) -> str:
    """The store's own mark of an object's version; empty if it has none.

    Args:
        info: what fsspec says of the object.
    """
    return next((f"{key} {info[key]}" for key in _MARKS if info.get(key)), "")


def entry_of(info: Mapping[str, Any]) -> Entry:
    """An object as a listing of its store has it."""
    return Entry(int(info["size"] or 0), mark_of(info))


def entry_of_file(stat: os.stat_result) -> Entry:
    """A file on a disk."""
    return Entry(stat.st_size, f"mtime_ns {stat.st_mtime_ns}")


def md5_of(mark: str) -> str | None:
    """The MD5 of an object's bytes, in hexadecimal digits, if its mark is that: the ETag of most stores is one, unless
    the object came in parts or is encrypted by a key of the user's."""
    kind, _, value = mark.partition(" ")
    value = value.strip('"').lower() if kind != "md5Hash" else base64.b64decode(value).hex()
    is_md5 = kind in ("ETag", "etag", "md5Hash") and len(value) == _MD5_DIGITS
    return value if is_md5 and set(value) <= set("0123456789abcdef") else None
