"""Models from stores on a node's own disk: fetched once a node, and there as a whole or not at all.

Each has a directory, named by its revision, and a lock beside it. Who fetches it holds the lock alone, and the other
cards of the node wait; who has loaded it holds the lock with others until its process ends, so that nobody removes it
meanwhile. The system frees a lock when its process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gaudi_batch.errors import StorageError
from gaudi_batch.storage.listing import Entry, md5_of
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted

log = logging.getLogger(__name__)

FETCH_THREADS = 8
"""Files of a model that are fetched at the same time."""
CHUNK = 64 * 1024**2
"""Bytes of a file that are asked for at a time."""


class ModelCache:
    """The models on this node's disk.

    Args:
        root: their directory.
        max_bytes: of all of them; the least recently used go when another is fetched, those in use never.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._held: list[int] = []

    def get(self, revision: str, storage: Storage, files: Mapping[str, Entry]) -> Path:
        """The directory of a model, fetched if it is not there; it stays as long as this process lives.

        Args:
            revision: of the model; names the directory.
            storage: where it lies.
            files: what it has there, by path.

        Raises:
            StorageError: storage failed, or has other files than these by now.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._root / f"{revision}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._held.append(lock)
        directory = self._root / revision
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if directory.is_dir():
                os.utime(directory)  # when it was used last
                return directory
            # Between the two another may have fetched it, so it is looked for again.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.is_dir():
                self._fetch(directory, storage, files)

    def release(self) -> None:
        """Lets others remove what this process has got here."""
        while self._held:
            os.close(self._held.pop())

    def _fetch(self, directory: Path, storage: Storage, files: Mapping[str, Entry]) -> None:
        needed = sum(entry.size for entry in files.values())
        self._make_room(needed)
        log.info("%s: fetching %s, %.1f GB", storage.url, counted(len(files), "file"), needed / 1e9)
        part = directory.with_name(f".{directory.name}")  # what an earlier process has left of it counts
        with ThreadPoolExecutor(FETCH_THREADS, "model") as pool:
            for _ in pool.map(lambda path: _fetch_file(storage, path, files[path], part / path), files):
                pass
        part.rename(directory)

    def _make_room(self, needed: int) -> None:
        """Removes models that nobody uses, the least recently used first, until there is room for so many bytes."""
        present = sorted(
            (path for path in self._root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime
        )
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in present}
        total = sum(sizes.values())
        for path in present:
            if total + needed <= self._max_bytes:
                return
            with _alone(self._root / f"{path.name.lstrip('.')}.lock") as is_alone:
                if is_alone:
                    log.info("%s is removed to make room for another model", path)
                    shutil.rmtree(path, ignore_errors=True)
                    total -= sizes[path]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Yields whether nobody else has a lock, and has it meanwhile."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _fetch_file(storage: Storage, path: str, entry: Entry, local: Path) -> None:
    if local.is_file() and local.stat().st_size == entry.size and _is_whole(local, entry):
        return
    local.parent.mkdir(parents=True, exist_ok=True)
    with local.open("wb") as file:
        for start in range(0, entry.size, CHUNK):
            file.write(storage.get_range(path, start, min(start + CHUNK, entry.size)))
        file.flush()
        os.fsync(file.fileno())
    if local.stat().st_size != entry.size or not _is_whole(local, entry):
        local.unlink()
        raise StorageError(f"{storage.url}/{path} is not what it was when the job began")


def _is_whole(local: Path, entry: Entry) -> bool:
    """Whether a file has the bytes of which the store tells the MD5; where it tells none, its size has to do."""
    expected = md5_of(entry.mark)
    if expected is None:
        return True
    hasher = hashlib.md5(usedforsecurity=False)
    with local.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest() == expected
