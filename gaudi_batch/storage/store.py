"""One root in a store or on a disk: the only place that writes objects, and the only one that tries storage again.

Everything else speaks in paths relative to a root. A put is atomic on all that `open_filesystem` takes: a reader sees
the whole object or none. An object store does so by itself; on a disk an object is written under another name and
renamed, so a shared file system must rename at once for all who look. What a store itself calls
impossible (no permission, no such bucket, a full disk) is raised at once; all else that goes wrong is tried again with
backoff and jitter, for as long as the job's patience lasts. So is a bucket that is not there, or credentials that are
not, once they have been. A try that does not come back is given up and counts as one that failed, so nothing waits for
storage longer than the patience and one more try.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from gaudi_batch.errors import StorageError
from gaudi_batch.redaction import learn, redact
from gaudi_batch.storage.filesystem import (
    is_azure,
    lacks_credentials,
    look_for_credentials_again,
    open_filesystem,
    require_bucket,
    subdue,
)
from gaudi_batch.storage.retry import (
    CREDENTIALS_TIMEOUT_S,
    BucketGone,
    bucket_is_gone,
    code_of,
    delays,
    in_time,
    in_time_or_cancelled,
    is_permanent,
    status_of,
)

T = TypeVar("T")

log = logging.getLogger("gaudi_batch")

TRY_SECONDS = 60.0
"""How long one try at reading or writing an object may take, beside what its bytes need at `SLOWEST_BYTES_PER_S`."""
MANY_SECONDS = 600.0
"""The same of what takes many requests, such as a listing."""
SLOWEST_BYTES_PER_S = 1e6
WORD_SECONDS = 10.0
"""How long something is tried in silence; the next word comes when it has been tried for twice as long."""
PRECONDITION_FAILED = 412
LAST_SECONDS = 10.0
"""How long a run that stops tries to write down how it ended; storage may be why it stops."""
REMOVE_THREADS = 16


class Storage:
    """A directory of a store or a disk that `open_filesystem` takes, addressed by relative paths with forward slashes.

    Args:
        url: root; a plain path is a local directory.
        options: fsspec storage options.
        patience: seconds for which a failing operation is tried again; may be changed while operations go on.
        read_only: whether nothing is to be written there.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any] | None = None,
        patience: float = 600.0,
        read_only: bool = False,
    ) -> None:
        self.options = dict(options or {})
        self.filesystem, root = open_filesystem(url, self.options, read_only)
        self.root = root.rstrip("/") or "/"
        self.query = ""
        self.local = isinstance(self.filesystem, LocalFileSystem)
        self.place = (root if self.local else url).rstrip("/")
        self.url = redact(self.place)
        self.creates = self.local
        """Whether a put that is to create an object is refused where there is one."""
        self.patience = patience
        self.try_seconds = TRY_SECONDS
        subdue(self.filesystem)
        self.trouble = ""
        """What the last try that failed has said, for whoever waits."""
        self._known = False  # whether the bucket and the credentials have been seen to be there
        self._made: set[str] = set()
        self._running: dict[object, float] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_running", "_made")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        learn(self.options)
        subdue(self.filesystem)
        self._made, self._running, self._lock = set(), {}, threading.Lock()

    def longest_running_s(self) -> float:
        """Seconds for which the oldest operation that has not ended has been going on; 0 if there is none."""
        with self._lock:
            return time.monotonic() - min(self._running.values()) if self._running else 0.0

    def hurry(self) -> None:
        """Gives operations, those under way among them, no more time than a run that stops has."""
        self.patience = min(self.patience, LAST_SECONDS)
        self.try_seconds = min(self.try_seconds, LAST_SECONDS)

    def put(
        self,
        path: str,
        data: bytes,
        before: Callable[[], None] = lambda: None,
        keep: Callable[[], bool] = lambda: True,
        try_seconds: float | None = None,
        create: bool = False,
    ) -> None:
        """Writes an object whole.

        Args:
            path: of the object.
            data: its bytes.
            before: called before each try; what it raises is raised.
            keep: asked while a try goes on; one for which it says no is given up, and counts as one that failed.
            try_seconds: how long one try may take beside what the size needs, if not as long as any other.
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
                # In one request: not every store that refuses a put refuses to complete an upload in parts.
                options["chunksize"] = len(data) + 1
        seconds, _ = self._limit(len(data), try_seconds)
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
        """Finds out whether the store refuses to create an object that is there, for `put` to rely on.

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
            why = str(error)  # as a rule, it does not know what is asked of it
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

        return self.attempt(f"read {path}", read, seconds)

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

        return self.attempt(f"read {path}", read, seconds)

    def open(self, path: str) -> io.RawIOBase:
        """An object as a file to read at any position; each read is tried again like everything here."""
        return _Ranges(self, path, int(self.info(path)["size"]))

    def info(self, path: str) -> dict[str, Any]:
        """What the store says of an object, its size in bytes among it. Raises StorageError."""
        seconds, limit = self._limit()

        def ask() -> dict[str, Any]:
            with self._telling_bucket():
                return dict(self.filesystem.info(self.full(path), **limit))

        return self.attempt(f"read {path}", ask, seconds)

    def at(self, root: str, query: str = "") -> Storage:
        """The same store with another root, given as the filesystem knows it, and a query that every path gets: that
        of a signed URL, which is a secret and no part of any name."""
        other = copy.copy(self)
        other.root = root.rstrip("/") or "/"
        other.query = query
        return other

    def once(self) -> Storage:
        """The same place for operations that are tried only once."""
        other = copy.copy(self)
        other.patience = 0.0
        return other

    def names(self, directory: str) -> list[str]:
        """Names of what lies directly in a directory, sorted; none where there is no such directory."""

        def listing() -> list[str]:
            with self._none_if_absent():
                found = self.filesystem.ls(self.full(directory), detail=False, **self._many())
                return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found} - {""})
            return []

        found = self.attempt(f"list {directory or '.'}", listing, MANY_SECONDS)
        return [name for name in found if ".part-" not in name]

    def remove(
        self, path: str, before: Callable[[], None] = lambda: None, keep: Callable[[], bool] = lambda: True
    ) -> None:
        """Removes an object or a directory with all that it holds; one that is not there is no error. `before` and
        `keep` are as in `put`. Raises StorageError."""

        delete_file = self._given_up("rm_file", self.try_seconds, keep)

        def delete_one(full: str) -> None:
            with self._none_if_absent():
                delete_file(full)

        def delete() -> None:
            full = self.full(path)
            with self._none_if_absent():
                if self.local:
                    self.filesystem.rm(full, recursive=True)
                else:
                    found = self.filesystem.find(full, **self._many())
                    if not found:
                        require_bucket(self.filesystem, full, self.try_seconds)
                    # One by one: not every S3 server understands the checksums that bulk deletion is sent with.
                    with ThreadPoolExecutor(REMOVE_THREADS) as pool:
                        list(pool.map(delete_one, found))
            self._made = {made for made in self._made if not f"{made}/".startswith(f"{full}/")}

        self.attempt(f"remove {path}", delete, MANY_SECONDS, before)

    def full(self, path: str) -> str:
        """The path that the filesystem knows."""
        return (f"{self.root}/{path}".rstrip("/") if self.root != "/" else f"/{path}") + self.query

    @contextlib.contextmanager
    def _telling_bucket(self) -> Iterator[None]:
        """Raises BucketGone for an object's absence if it is its bucket that is absent."""
        try:
            yield
        except FileNotFoundError as error:
            if code_of(error) is None:
                require_bucket(self.filesystem, self.root, self.try_seconds)
            raise

    @contextlib.contextmanager
    def _none_if_absent(self) -> Iterator[None]:
        """Passes over the absence of an object; that of its bucket says nothing of the object."""
        try:
            with self._telling_bucket():
                yield
        except FileNotFoundError as error:
            if bucket_is_gone(error):
                raise

    def _limit(self, size: int = 0, try_seconds: float | None = None) -> tuple[float, dict[str, float]]:
        """Seconds that a try may take, and the option by which an asynchronous filesystem gives it up itself: its
        sockets time out where nothing comes, if at all, but not where nothing is taken."""
        seconds = (self.try_seconds if try_seconds is None else try_seconds) + size / SLOWEST_BYTES_PER_S
        return seconds, {"timeout": seconds} if self.filesystem.async_impl else {}

    def _many(self) -> dict[str, float]:
        return {"timeout": MANY_SECONDS} if self.filesystem.async_impl else {}

    def _given_up(self, name: str, seconds: float, keep: Callable[[], bool]) -> Callable[..., Any]:
        """A method of the filesystem. Where it is asynchronous, a call of it raises TimeoutError once it has taken too
        long or `keep` says no."""
        filesystem = self.filesystem
        if not filesystem.async_impl:
            return getattr(filesystem, name)  # type: ignore[no-any-return]

        def call(*arguments: Any, **options: Any) -> Any:
            running = getattr(filesystem, f"_{name}")(*arguments, **options)
            return in_time_or_cancelled(running, filesystem.loop, seconds, keep)

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
        """Writes by `write`, which takes a path that the filesystem knows."""
        full = self.full(path)
        there = False

        def put_object() -> None:
            nonlocal there
            try:
                write(full)
            except FileNotFoundError as error:
                if bucket_is_gone(error):
                    raise
                raise BucketGone(f"the bucket, or an upload to it, is not there: {error}") from None
            except Exception as error:
                if not (create and (isinstance(error, FileExistsError) or status_of(error) == PRECONDITION_FAILED)):
                    raise
                there = True

        def put_local() -> None:
            nonlocal there
            parent = full.rpartition("/")[0]
            if parent not in self._made:
                Path(parent).mkdir(parents=True, exist_ok=True)
                self._made.add(parent)
            # Named so that who reads the directory as a dataset passes over it.
            part = Path(full).with_name(f".{Path(full).name}.part-{uuid.uuid4().hex[:8]}")
            try:
                write(str(part))
                _sync(part)
                if not keep():  # nothing can end a write, but its name may come too late
                    raise TimeoutError("what was written came too late to get its name")
                there = create and not _link(part, full)
                if not create:
                    part.replace(full)
            finally:
                part.unlink(missing_ok=True)

        self.attempt(f"write {path}", put_local if self.local else put_object, seconds, before)
        self._known = True
        if there:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), full)

    def attempt(
        self,
        what: str,
        operation: Callable[[], T],
        seconds: float = TRY_SECONDS,
        before: Callable[[], None] = lambda: None,
    ) -> T:
        """Runs an operation until it succeeds, storage refuses it, or the patience is over.

        Args:
            what: the operation, as one says "can't ...".
            operation: does it.
            seconds: how long one try may take. One on a filesystem that is asynchronous has timeouts of its own; any
                other is left behind in its thread.
            before: called before each try; what it raises is raised.

        Raises:
            StorageError: with the storage's own words, secrets taken out.
        """
        started, next_word = time.monotonic(), WORD_SECONDS
        without_credentials = False
        this = object()
        with self._lock:
            self._running[this] = started
        try:
            for delay in delays():
                before()
                try:
                    if without_credentials:
                        look_for_credentials_again(self.filesystem)
                        without_credentials = False
                    return operation() if self.filesystem.async_impl else in_time(operation, seconds)
                except Exception as error:
                    waited = time.monotonic() - started
                    said = redact(" ".join(f"{type(error).__name__}: {error}".split()), self.options)
                    self.trouble = f": {said[:200]}"
                    patience, limit = self.patience, " (storage_patience)"
                    if self._known and lacks_credentials(self.filesystem, error):
                        patience, limit = min(patience, CREDENTIALS_TIMEOUT_S), ""
                        without_credentials = True
                    elif is_permanent(error) and not (self._known and bucket_is_gone(error)):
                        raise StorageError(f"{self.url}: can't {what}: {said}", refused=True) from None
                    if waited + delay > patience:
                        raise StorageError(
                            f"{self.url}: can't {what}, tried for {waited:.0f} s{limit}: {said}"
                        ) from None
                    if waited < next_word:
                        log.debug("%s: can't %s, trying again in %.1f s: %s", self.url, what, delay, said)
                    else:
                        next_word = 2 * waited
                        so_far = f"tried for {waited:.0f} s of {patience:.0f} s{limit}"
                        log.warning("%s: can't %s, %s: %s", self.url, what, so_far, said)
                    time.sleep(delay)
        finally:
            with self._lock:
                del self._running[this]
        raise AssertionError("the delays never end")


def _link(part: Path, full: str) -> bool:
    """Gives a file its name unless that is taken; returns whether. Without hard links, what has the name is lost."""
    try:
        os.link(part, full)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        part.replace(full)
    return True


def _sync(path: Path) -> None:
    """Has a file on its disk before its name is, so that a power cut leaves no name of an empty file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class _Ranges(io.RawIOBase):
    def __init__(self, storage: Storage, path: str, size: int) -> None:
        self._storage, self._path, self._size, self._position = storage, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._position + len(buffer))
        data = self._storage.get_range(self._path, self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
