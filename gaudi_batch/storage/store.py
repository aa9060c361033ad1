"""One root in a store or on a disk: the only place that writes objects, and the only one that tries storage again.

Everything else speaks in paths relative to a root. A put is atomic on all that `open_filesystem` takes: a reader sees
the whole object or none. An object store does so by itself; on a disk an object is written under another name and
renamed, so a shared file system must rename at once for all who look. How long what fails is tried
again is in `retrying.py`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gaudi_batch.errors import StorageError
from gaudi_batch.storage.disk import write_whole
from gaudi_batch.storage.filesystem import (
    is_azure,
    require_bucket,
)
from gaudi_batch.storage.reading import ReadableStorage
from gaudi_batch.storage.retry import (
    BucketGone,
    bucket_is_gone,
    run_or_cancel,
    status_of,
)
from gaudi_batch.storage.retrying import MANY_TIMEOUT_S

log = logging.getLogger(__name__)

PRECONDITION_FAILED = 412
REMOVE_THREADS = 16


class Storage(ReadableStorage):
    """A directory of a store or a disk that `open_filesystem` takes, to read and to write; see `ReadableStorage`."""

    @functools.cached_property
    def creates(self) -> bool:
        """Whether the store refuses a put that is to create an object where one exists; see `find_out_create`."""
        return self.local

    @functools.cached_property
    def _made(self) -> set[str]:
        """Directories that are there."""
        return set()

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

    def _remove_local(self, full: str) -> None:
        # Not by fsspec's `rm`, which asks for the working directory: Ray may remove that of a job which goes on.
        try:
            if Path(full).is_dir() and not Path(full).is_symlink():
                shutil.rmtree(full)
            else:
                Path(full).unlink()
        except FileNotFoundError as error:
            # Python 3.12 and older end so at the first file in a directory that its writer renames meanwhile.
            if os.path.lexists(full):
                raise OSError(errno.EAGAIN, f"{error.filename} went while it was removed", full) from None
            raise

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
                    self._remove_local(full)
                else:
                    paths = self.filesystem.find(full, **self._many())
                    if not paths:
                        require_bucket(self.filesystem, full, self.try_timeout_s)
                    # One by one: some S3 servers do not understand the checksums of a bulk deletion.
                    with ThreadPoolExecutor(REMOVE_THREADS) as pool:
                        list(pool.map(delete_one, paths))
            self._made = {made for made in self._made if not f"{made}/".startswith(f"{full}/")}

        self.with_retries(f"remove {path}", delete, MANY_TIMEOUT_S, before)

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
