"""Models on a node's own disk: fetched once a node, from their origin or from another node, and there as a whole or not
at all.

Each has a directory, named by its revision, with a list of its files in it, and beside it two locks. Who fetches a
model holds the one, and the other cards of the node wait; who uses it holds the other together with them until its
process ends, so that nobody removes it meanwhile. The system frees a lock when its process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.pipelines.fetching import (
    LocalModel,
    ModelFile,
    Origin,
    Peer,
    PeerLost,
    Peers,
    fetch_files,
    wrong_files,
)

log = logging.getLogger(__name__)

LISTING = ".files.json"
"""The list of a model's files, in its directory."""
DIRECTORY = "GAUDI_BATCH_MODELS"
"""The variable that names another directory for models."""
GIGABYTES = "GAUDI_BATCH_MODELS_GB"
"""The variable that says how large that may become."""
DEFAULT_GIGABYTES = 200


class ModelCache:
    """The models on this node's disk.

    Args:
        root: their directory.
        max_bytes: of all of them; the least recently used go when another is fetched, those in use never.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self._max_bytes = max_bytes
        self._held: list[int] = []

    def get(self, origin: Origin, peers: Peers) -> Path:
        """The directory of a model, fetched if it is not there; it stays as long as this process lives.

        Args:
            origin: where the model comes from.
            peers: other nodes, which may have it already, and may want it from this one.

        Raises:
            StorageError: its origin failed or has other files than it said, or the disk has no room for it.
        """
        model = origin.present() or self._get(origin, peers)
        if model.is_whole:
            peers.offer(origin.revision, model)
        return model.directory

    def release(self) -> None:
        """Lets others remove what this process has got here."""
        while self._held:
            os.close(self._held.pop())

    def _get(self, origin: Origin, peers: Peers) -> LocalModel:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._held.append(_locked(self.root / f"{origin.revision}.lock", fcntl.LOCK_SH))
            fetching = _locked(self.root / f"{origin.revision}.fetching", fcntl.LOCK_EX)
        except OSError as error:
            if origin.is_near():  # beside a cache of the hub that can only be read
                return origin.fetch(self.root, {})
            raise StorageError(
                f"models can't be kept in {self.root}: {error}; name another directory of this node's disk by"
                f" {DIRECTORY}",
                refused=True,
            ) from None
        try:
            while True:
                if model := self._present(origin.revision) or origin.present():
                    return model
                if origin.is_near():
                    return self._fetch(origin, None)
                with contextlib.suppress(PeerLost), peers.turn(origin) as peer:
                    model = self._fetch(origin, peer)
                    if model.is_whole:  # offered before the turn ends, so that nobody asks the origin again
                        peers.offer(origin.revision, model)
                    return model
        finally:
            os.close(fetching)

    def _present(self, revision: str) -> LocalModel | None:
        directory = self.root / revision
        if not directory.is_dir():
            return None
        os.utime(directory)  # when it was used last
        listed = json.loads((directory / LISTING).read_text())
        return LocalModel(directory, {path: ModelFile(*file) for path, file in listed.items()})

    def _fetch(self, origin: Origin, peer: Peer | None) -> LocalModel:
        try:
            return self._fetch_files(origin, peer)
        except OSError as error:
            raise StorageError(
                f"a model can't be written to {self.root}: {error}; make room there, or name another directory of this"
                f" node's disk by {DIRECTORY}",
                refused=True,
            ) from None

    def _fetch_files(self, origin: Origin, peer: Peer | None) -> LocalModel:
        files = origin.files() if peer is None else peer.files()
        part = self.root / f".{origin.revision}"  # what an earlier process has left of it counts
        needed = sum(file.size for file in files.values()) - _bytes_in(part)
        self._make_room(needed)
        if peer is None:
            log.info("fetching model %s from its origin", origin.revision[:12])
            model = origin.fetch(part, files)
            if model.directory != part:
                return model
            files = model.files
        else:
            log.info("fetching model %s, %.1f GB, from another node", origin.revision[:12], needed / 1e9)
            try:
                fetched = fetch_files(files, part, lambda path, take: peer.read(path, files[path].size, take))
                if wrong := wrong_files(files, fetched, part):
                    raise StorageError(f"{', '.join(wrong)} came with other bytes than they have")
            except StorageError as error:
                raise PeerLost(str(error)) from None
        with (part / LISTING).open("w") as listing:
            json.dump(files, listing)
            listing.flush()
            os.fsync(listing.fileno())
        return LocalModel(part.rename(self.root / origin.revision), files)

    def _make_room(self, needed: int) -> None:
        """Removes models that nobody uses, the least recently used first, until there is room for so many bytes.

        Raises:
            StorageError: there is none on the disk.
        """
        if needed <= 0:
            return
        lock = _locked(self.root / "room.lock", fcntl.LOCK_EX)
        try:
            present = [path for path in self.root.iterdir() if path.is_dir() and self._lock_of(path).exists()]
            for path in present:
                if path.name.startswith(".."):
                    shutil.rmtree(path, ignore_errors=True)  # a process that was killed was removing it
            sizes = {path: _bytes_in(path) for path in present if not path.name.startswith("..")}
            free = shutil.disk_usage(self.root).free
            if needed > free + sum(sizes.values()):
                raise self._no_room(needed, free)
            for path in sorted(sizes, key=_last_used):
                if sum(sizes.values()) + needed <= self._max_bytes and needed <= shutil.disk_usage(self.root).free:
                    break
                with _alone(self._lock_of(path)) as is_alone:
                    if is_alone:
                        log.info("%s is removed to make room for another model", path)
                        removed = path.rename(self.root / f"..{path.name}")  # else a half would pass for the whole
                        shutil.rmtree(removed, ignore_errors=True)
                        del sizes[path]
            free = shutil.disk_usage(self.root).free
        finally:
            os.close(lock)
        if needed > free:
            raise self._no_room(needed, free)

    def _lock_of(self, directory: Path) -> Path:
        """The lock of those who use the model in a directory; what has none is no model."""
        return self.root / f"{directory.name.lstrip('.')}.lock"

    def _no_room(self, needed: int, free: int) -> StorageError:
        return StorageError(
            f"a model of {needed / 1e9:.1f} GB does not fit into {self.root}, where {free / 1e9:.1f} GB are free;"
            f" name another directory of this node's disk by {DIRECTORY}",
            refused=True,
        )


def cache_of_node() -> ModelCache:
    """The models of this node, where its environment says; beside the hub's cache if that has a place of its own.

    Raises:
        InputError: the environment says nonsense.
    """
    hub = os.environ.get("HF_HOME")
    directory = os.environ.get(DIRECTORY) or (f"{hub}/gaudi-batch" if hub else "~/.cache/gaudi-batch/models")
    size = os.environ.get(GIGABYTES, str(DEFAULT_GIGABYTES))
    if not size.isdecimal():
        raise InputError(f"{GIGABYTES} is {size!r}; it must be a whole number of gigabytes")
    return ModelCache(Path(directory).expanduser(), int(size) * 10**9)


def _bytes_in(directory: Path) -> int:
    """Bytes of all files below a directory, of which others may remove some meanwhile."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def _last_used(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _locked(path: Path, kind: int) -> int:
    """A file with a lock on it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, kind)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Yields whether nobody else has a lock, and has it meanwhile."""
    try:
        descriptor = _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)
