"""One root in a store or on a disk, as whoever only reads has it.

Everything else speaks in paths relative to a root. How long what fails is tried again is in `retrying.py`.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from gaudi_batch.redaction import redact
from gaudi_batch.storage.disk import PART_MARK, parse_part
from gaudi_batch.storage.filesystem import open_filesystem, require_bucket
from gaudi_batch.storage.listing import Entry, entry_of, entry_of_file
from gaudi_batch.storage.ranges import RangeReader
from gaudi_batch.storage.retry import bucket_is_gone, code_of
from gaudi_batch.storage.retrying import MANY_TIMEOUT_S, Retrying

if TYPE_CHECKING:
    from typing_extensions import Self

SLOWEST_BYTES_PER_S = 1e6
PART_BYTES = 8 << 20
"""Bytes of a large object that are read at a time."""


class ReadableStorage(Retrying):
    """A directory of a store or a disk, addressed by relative paths with forward slashes.

    Args:
        url: root; a plain path is a local directory.
        options: fsspec storage options.
        retry_timeout_s: seconds for which a failing operation is tried again.
        read_only: whether nothing is to be written there.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any] | None = None,
        retry_timeout_s: float = 600.0,
        read_only: bool = False,
    ) -> None:
        filesystem, root = open_filesystem(url, options or {}, read_only)
        self.local = isinstance(filesystem, LocalFileSystem)
        self.place = (root if self.local else url).rstrip("/")
        super().__init__(filesystem, redact(self.place), options or {}, retry_timeout_s)
        self.root = root.rstrip("/") or "/"
        self.query = ""

    def get(self, path: str) -> bytes | None:
        """The bytes of an object, or None where there is none. Raises StorageError."""
        seconds, limit = self._limit()

        def read() -> bytes | None:
            with self._none_if_absent():
                try:
                    data: bytes = self.filesystem.cat_file(self.full(path), **limit)
                except FSTimeoutError:
                    limit["timeout"], _ = self._limit(self.filesystem.info(self.full(path), **limit)["size"])
                    raise
                self._known = True
                return data
            return None

        return self.with_retries(f"read {path}", read, seconds)

    def sha256(self, path: str) -> str | None:
        """The SHA-256 of an object's bytes in hexadecimal digits, PART_BYTES of it in memory at a time; None where
        there is none. Raises StorageError."""
        entry = self.entry(path)
        if entry is None:
            return None
        if entry.size <= PART_BYTES:
            data = self.get(path)
            return None if data is None else hashlib.sha256(data).hexdigest()
        digest = hashlib.sha256()
        for start in range(0, entry.size, PART_BYTES):
            digest.update(self.get_range(path, start, min(entry.size, start + PART_BYTES)))
        return digest.hexdigest()

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of an object. Raises StorageError."""
        if stop <= start:
            return b""
        seconds, limit = self._limit(stop - start)

        def read() -> bytes:
            with self._telling_bucket():
                data: bytes = self.filesystem.cat_file(self.full(path), start=start, end=stop, **limit)
            if len(data) != stop - start:
                raise OSError(errno.EIO, f"{len(data)} bytes came instead of {stop - start}")
            self._known = True
            return data

        return self.with_retries(f"read {path}", read, seconds)

    def open(self, path: str, size: int | None = None) -> io.RawIOBase:
        """An object as a file to read at any position; each read is tried again like everything here.

        Args:
            path: the object.
            size: its bytes; None asks the store for them.
        """
        size = int(self.info(path)["size"]) if size is None else size
        return RangeReader(lambda start, stop: self.get_range(path, start, stop), size)

    def info(self, path: str) -> dict[str, Any]:
        """What the store says of an object, including its size in bytes. Raises StorageError."""
        seconds, limit = self._limit()

        def ask() -> dict[str, Any]:
            with self._telling_bucket():
                return dict(self.filesystem.info(self.full(path), **limit))

        return self.with_retries(f"read {path}", ask, seconds)

    def at(self, root: str, query: str = "") -> Self:
        """The same store with another root, given as the filesystem knows it, and a query that is added to every path:
        that of a signed URL, which is a secret and no part of a name."""
        other = copy.copy(self)
        other.root = root.rstrip("/") or "/"
        other.query = query
        return other

    def once(self) -> Self:
        """The same place, for operations that are tried only once."""
        return self.tried_for(0.0)

    def tried_for(self, seconds: float) -> Self:
        """The same place, for operations that are tried again for so many seconds at most."""
        other = copy.copy(self)
        other.retry_timeout_s = min(seconds, self.retry_timeout_s)
        return other

    def names(self, directory: str) -> list[str]:
        """Sorted names of the entries of a directory; none if there is no such directory. Files that are being written
        are left out. Raises StorageError."""
        return [name for name in self._listed(directory) if PART_MARK not in name]

    def unfinished(self, directory: str) -> dict[str, str]:
        """The files of a directory on a disk that are being written, or were when their process was killed, each with
        the name that it is to have. Raises StorageError."""
        whole = {name: parse_part(name) for name in self._listed(directory)} if self.local else {}
        return {name: wanted for name, wanted in whole.items() if wanted is not None}

    def _listed(self, directory: str) -> list[str]:
        def listing() -> list[str]:
            with self._none_if_absent():
                names = self.filesystem.ls(self.full(directory), detail=False, **self._many())
                return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in names} - {""})
            return []

        return self.with_retries(f"list {directory or '.'}", listing, MANY_TIMEOUT_S)

    def entries(self, directory: str) -> dict[str, Entry]:
        """The objects in a directory by name; none if there is no such directory. Raises StorageError."""

        def listing() -> dict[str, Entry]:
            with self._none_if_absent():
                full = self.full(directory)
                if self.local:
                    with os.scandir(full) as files:
                        return {file.name: entry for file in files if (entry := _entry_of_file(file)) is not None}
                infos = self.filesystem.ls(full, detail=True, **self._many())
                return {str(info["name"]).rsplit("/", 1)[-1]: entry_of(info) for info in infos}
            return {}

        return self.with_retries(f"list {directory}", listing, MANY_TIMEOUT_S)

    def entry(self, path: str) -> Entry | None:
        """An object as `entries` has it; None where there is none. Raises StorageError."""
        seconds, limit = self._limit()

        def ask() -> Entry | None:
            with self._none_if_absent():
                full = self.full(path)
                return entry_of_file(Path(full).stat()) if self.local else entry_of(self.filesystem.info(full, **limit))
            return None

        return self.with_retries(f"look at {path}", ask, seconds)

    def full(self, path: str) -> str:
        """The path as the filesystem knows it."""
        return (f"{self.root}/{path}".rstrip("/") if self.root != "/" else f"/{path}") + self.query

    @contextlib.contextmanager
    def _telling_bucket(self) -> Iterator[None]:
        """Raises BucketGone for an object's absence if its bucket is absent."""
        try:
            yield
        except FileNotFoundError as error:
            if code_of(error) is None:
                require_bucket(self.filesystem, self.root, self.try_timeout_s)
            raise

    @contextlib.contextmanager
    def _none_if_absent(self) -> Iterator[None]:
        """Ignores the absence of an object, but not that of its bucket."""
        try:
            with self._telling_bucket():
                yield
        except FileNotFoundError as error:
            if bucket_is_gone(error):
                raise

    def _limit(self, size: int = 0, try_timeout_s: float | None = None) -> tuple[float, dict[str, float]]:
        """Seconds that a try may take, and the option by which an asynchronous filesystem gives it up itself: its
        sockets time out where nothing comes, if at all, but not where nothing is taken."""
        seconds = (self.try_timeout_s if try_timeout_s is None else try_timeout_s) + size / SLOWEST_BYTES_PER_S
        return seconds, {"timeout": seconds} if self.filesystem.async_impl else {}

    def _many(self) -> dict[str, float]:
        return {"timeout": MANY_TIMEOUT_S} if self.filesystem.async_impl else {}


def _entry_of_file(file: os.DirEntry[str]) -> Entry | None:
    """A file in a listing; None if it is one that is being written, or has gone since it was listed."""
    try:
        return None if PART_MARK in file.name else entry_of_file(file.stat())
    except FileNotFoundError:
        return None
