"""One root in a store or on a disk: the only place that writes objects, and the only one that tries storage again.

Everything else speaks in paths relative to a root. A put is atomic on all that `open_filesystem` takes: a reader sees
the whole object or none. An object store does so by itself; on a disk an object is written under another name and
renamed, so a shared file system must rename at once for all who look. How long what fails is tried
again is in `retrying.py`.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from gaudi_batch.errors import StorageError
from gaudi_batch.redaction import redact
from gaudi_batch.storage.disk import write_whole
from gaudi_batch.storage.filesystem import (
    is_azure,
    open_filesystem,
    require_bucket,
)
from gaudi_batch.storage.ranges import RangeReader
from gaudi_batch.storage.retry import (
    BucketGone,
    bucket_is_gone,
    code_of,
    run_or_cancel,
    status_of,
)
from gaudi_batch.storage.retrying import MANY_TIMEOUT_S, Retrying

log = logging.getLogger(__name__)

SLOWEST_BYTES_PER_S = 1e6
PRECONDITION_FAILED = 412
REMOVE_THREADS = 16


class Storage(Retrying):
    """A directory of a store or a disk that `open_filesystem` takes, addressed by relative paths with forward slashes.

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
        self.creates = self.local
        """Whether the store refuses a put that is to create an object where one exists."""
        self._made: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_made": set()}

    def put(
        self,
        path: str,
        data: bytes,
        before: Callable[[], None] = lambda: None,
        keep: Callable[[], bool] = lambda: True,
        try_timeout_s: float | None = None,
        create: bool = False,
    ) -> None:
        """Writes an object whole.

        Args:
            path: of the object.
            data: its bytes.
            before: called before each try; what it raises is raised.
            keep: asked while a try goes on; one for which it says no is given up, and counts as one that failed.
            try_timeout_s: how long one try may take beside what the size needs, if not as long as any other.
            create: only where there is none, however late the write arrives. A store that can't (see `creates`)
                writes over what is there.

        Raises:
            StorageError: storage failed.
            FileExistsError: there is one.
        """
        options: dict[str, Any] = {}
        if create and self.creates and not self.local:
            options = {"mode": "create"}
            if not is_azure(self.filesystem):
                # In one request: some stores refuse a conditional put but not the completion of a multipart upload.
                options["chunksize"] = len(data) + 1
        seconds, _ = self._limit(len(data), try_timeout_s)
        write = self._given_up("pipe_file", seconds, keep)
        self._put(path, lambda full: write(full, data, **options), seconds, before, keep, create)

    def put_file(
        self,
        path: str,
        local: str,
        before: Callable[[], None] = lambda: None,
        keep: Callable[[], bool] = lambda: True,
    ) -> None:
        """Writes a local file as an object, whole; `before` and `keep` are as in `put`. Raises StorageError."""
        seconds, _ = self._limit(Path(local).stat().st_size)
        write = self._given_up("put_file", seconds, keep)
        self._put(path, lambda full: write(local, full), seconds, before, keep)

    def find_out_create(
        self,
        path: str,
        data: bytes,
        before: Callable[[], None] = lambda: None,
        keep: Callable[[], bool] = lambda: True,
    ) -> None:
        """Finds out whether the store refuses to create an object that exists, so that `put` can rely on it.

        Args:
            path: of an object that is there.
            data: its bytes, which a store that does not refuse writes again.
            before: as in `put`.
            keep: as in `put`.

        Raises:
            StorageError: storage failed.
        """
        if self.local:
            return
        self.creates = True
        try:
            self.put(path, data, before, keep, create=True)
            why = "nothing, and wrote over one"
        except FileExistsError:
            return
        except StorageError as error:
            if not error.refused:
                raise
            why = str(error)  # an error of this kind usually means that the store does not know the condition
        self.creates = False
        log.info(
            "%s: the store can't create an object only where there is none; the lease alone guards what is committed"
            " (it said: %s)",
            self.url,
            why,
        )

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

    def open(self, path: str) -> io.RawIOBase:
        """An object as a file to read at any position; each read is tried again like everything here."""
        return RangeReader(lambda start, stop: self.get_range(path, start, stop), int(self.info(path)["size"]))

    def info(self, path: str) -> dict[str, Any]:
        """What the store says of an object, including its size in bytes. Raises StorageError."""
        seconds, limit = self._limit()

        def ask() -> dict[str, Any]:
            with self._telling_bucket():
                return dict(self.filesystem.info(self.full(path), **limit))

        return self.with_retries(f"read {path}", ask, seconds)

    def at(self, root: str, query: str = "") -> Storage:
        """The same store with another root, given as the filesystem knows it, and a query that is added to every path:
        that of a signed URL, which is a secret and no part of a name."""
        other = copy.copy(self)
        other.root = root.rstrip("/") or "/"
        other.query = query
        return other

    def once(self) -> Storage:
        """The same place, for operations that are tried only once."""
        other = copy.copy(self)
        other.retry_timeout_s = 0.0
        return other

    def names(self, directory: str) -> list[str]:
        """Sorted names of the entries of a directory; none if there is no such directory."""

        def listing() -> list[str]:
            with self._none_if_absent():
                names = self.filesystem.ls(self.full(directory), detail=False, **self._many())
                return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in names} - {""})
            return []

        names = self.with_retries(f"list {directory or '.'}", listing, MANY_TIMEOUT_S)
        return [name for name in names if ".part-" not in name]

    def remove(
        self, path: str, before: Callable[[], None] = lambda: None, keep: Callable[[], bool] = lambda: True
    ) -> None:
        """Removes an object or a directory with all that it holds; one that is not there is no error. `before` and
        `keep` are as in `put`. Raises StorageError."""

        delete_file = self._given_up("rm_file", self.try_timeout_s, keep)

        def delete_one(full: str) -> None:
            with self._none_if_absent():
                delete_file(full)

        def delete() -> None:
            full = self.full(path)
            with self._none_if_absent():
                if self.local:
                    self.filesystem.rm(full, recursive=True)
                else:
                    paths = self.filesystem.find(full, **self._many())
                    if not paths:
                        require_bucket(self.filesystem, full, self.try_timeout_s)
                    # One by one: some S3 servers do not understand the checksums of a bulk deletion.
                    with ThreadPoolExecutor(REMOVE_THREADS) as pool:
                        list(pool.map(delete_one, paths))
            self._made = {made for made in self._made if not f"{made}/".startswith(f"{full}/")}

        self.with_retries(f"remove {path}", delete, MANY_TIMEOUT_S, before)

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

    def _given_up(self, name: str, seconds: float, keep: Callable[[], bool]) -> Callable[..., Any]:
        """A method of the filesystem; if that is asynchronous, a call raises TimeoutError once it has taken too long or
        `keep` says no."""
        filesystem = self.filesystem
        if not filesystem.async_impl:
            return getattr(filesystem, name)  # type: ignore[no-any-return]

        def call(*arguments: Any, **options: Any) -> Any:
            running = getattr(filesystem, f"_{name}")(*arguments, **options)
            return run_or_cancel(running, filesystem.loop, seconds, keep)

        return call

    def _put(
        self,
        path: str,
        write: Callable[[str], Any],
        seconds: float,
        before: Callable[[], None],
        keep: Callable[[], bool],
        create: bool = False,
    ) -> None:
        """Writes by `write`, which takes a path as the filesystem knows it."""
        full = self.full(path)
        exists = False

        def put_object() -> None:
            nonlocal exists
            try:
                write(full)
            except FileNotFoundError as error:
                if bucket_is_gone(error):
                    raise
                raise BucketGone(f"the bucket, or an upload to it, is not there: {error}") from None
            except Exception as error:
                if not (create and (isinstance(error, FileExistsError) or status_of(error) == PRECONDITION_FAILED)):
                    raise
                exists = True

        def put_local() -> None:
            nonlocal exists
            parent = full.rpartition("/")[0]
            if parent not in self._made:
                Path(parent).mkdir(parents=True, exist_ok=True)
                self._made.add(parent)
            exists = not write_whole(Path(full), write, keep, create=create)

        self.with_retries(f"write {path}", put_local if self.local else put_object, seconds, before)
        self._known = True
        if exists:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), full)
