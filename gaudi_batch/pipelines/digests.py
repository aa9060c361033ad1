"""Digests of a model's files, as their origins tell them: `md5:`, `sha256:` or `git:` and hexadecimal digits."""

from __future__ import annotations

import hashlib
from pathlib import Path

CHUNK = 1 << 20
_SHA1_DIGITS, _SHA256_DIGITS = 40, 64


def digest_of_blob(name: str) -> str | None:
    """The digest that the name of a file in the hub's cache is: the SHA-256 of a large file, the hash that git gives a
    small one, or nothing."""
    if set(name) - set("0123456789abcdef"):
        return None
    return {_SHA256_DIGITS: f"sha256:{name}", _SHA1_DIGITS: f"git:{name}"}.get(len(name))


def is_whole(file: Path, size: int, digest: str | None) -> bool:
    """Whether a file is there, has a size and, unless that is None, a digest."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    if digest is None:
        return True
    kind, _, expected = digest.partition(":")
    hasher = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    if kind == "git":
        hasher.update(b"blob %d\0" % size)
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest() == expected
