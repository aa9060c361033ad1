"""Models on a node's own disk: fetched once a node, from their origin or from another node, and there as a whole or not
at all.

Each has a directory, named by its revision, and beside it the list of its files and two locks. Who fetches a model
holds the one, and the other cards of the node wait; who uses it holds the other together with them until its process
ends, so that nobody removes it meanwhile. The system frees a lock when its process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from gaudi_batch.errors import StorageError
from gaudi_batch.pipelines.digests import is_whole

log = logging.getLogger(__name__)

FETCH_THREADS = 8
"""Files of a model that are fetched at the same time."""


class PeerLost(Exception):
    """Another node can't give a model any more."""


class ModelFile(NamedTuple):
    """A file of a model."""

    size: int
    """Bytes."""
    digest: str | None
    """Of its bytes, see digests.py; None where its origin tells none, and its size has to do."""


Files: TypeAlias = Mapping[str, ModelFile]
"""The files of a model by their paths in its directory."""


class LocalModel(NamedTuple):
    """A model on this node's disk."""

    directory: Path
    files: Files


class Origin(Protocol):
    """Where a model comes from."""

    revision: str
    """Of the model; it names the directory and never means another content."""
    readers: int
    """Nodes that may fetch from it at the same time."""

    def present(self) -> LocalModel | None:
        """The model where the origin's own library keeps it on this node, if it is there as a whole."""

    def is_near(self) -> bool:
        """Whether the origin's own library seems to keep the model on this node, so that no other has to give it."""

    def files(self) -> Files:
        """The model's files. Raises StorageError."""

    def fetch(self, directory: Path, files: Files) -> LocalModel:
        """Puts the model into a directory, or where the origin's own library keeps it. Raises StorageError."""


class Peer(Protocol):
    """Another node that has a model. Its methods raise PeerLost."""

    def files(self) -> Files:
        """The model's files."""

    def read(self, path: str, size: int, file: Callable[[bytes], object]) -> None:
        """Hands on the content of one of them, of so many bytes, in order."""


class Peers(Protocol):
    """The other nodes of a job."""

    def turn(self, origin: Origin) -> contextlib.AbstractContextManager[Peer | None]:
        """Waits until this node may fetch a model, and yields who gives it: a node that has it, or None for its
        origin. PeerLost in the block is noted and passed on."""

    def offer(self, revision: str, model: LocalModel) -> None:
        """Lets other nodes fetch a model from this one."""


class NoPeers:
    """The peers of a process that fetches by itself."""

    @contextlib.contextmanager
    def turn(self, origin: Origin) -> Iterator[None]:
        """Yields at once: a model comes from its origin."""
        yield None

    def offer(self, revision: str, model: LocalModel) -> None:
        """Does nothing."""


NO_PEERS = NoPeers()


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
            StorageError: its origin failed, or has other files than it said.
        """
        model = origin.present() or self._get(origin, peers)
        peers.offer(origin.revision, model)
        return model.directory

    def release(self) -> None:
        """Lets others remove what this process has got here."""
        while self._held:
            os.close(self._held.pop())

    def _get(self, origin: Origin, peers: Peers) -> LocalModel:
        self.root.mkdir(parents=True, exist_ok=True)
        self._held.append(_locked(self.root / f"{origin.revision}.lock", fcntl.LOCK_SH))
        fetching = _locked(self.root / f"{origin.revision}.fetching", fcntl.LOCK_EX)
        try:
            while True:
                if model := self._present(origin.revision) or origin.present():
                    return model
                if origin.is_near():
                    return self._fetch(origin, None)
                with contextlib.suppress(PeerLost), peers.turn(origin) as peer:
                    model = self._fetch(origin, peer)
                    peers.offer(origin.revision, model)  # before the turn ends, so that nobody asks the origin again
                    return model
        finally:
            os.close(fetching)

    def _present(self, revision: str) -> LocalModel | None:
        directory = self.root / revision
        if not directory.is_dir():
            return None
        os.utime(directory)  # when it was used last
        listed = json.loads((self.root / f"{revision}.json").read_text())
        return LocalModel(directory, {path: ModelFile(*file) for path, file in listed.items()})

    def _fetch(self, origin: Origin, peer: Peer | None) -> LocalModel:
        files = origin.files() if peer is None else peer.files()
        needed = sum(file.size for file in files.values())
        self._make_room(needed)
        part = self.root / f".{origin.revision}"  # what an earlier process has left of it counts
        if peer is None:
            log.info("fetching model %s from its origin", origin.revision[:12])
            model = origin.fetch(part, files)
            if model.directory != part:
                return model
        else:
            log.info("fetching model %s, %.1f GB, from another node", origin.revision[:12], needed / 1e9)
            try:
                fetch_files(files, part, lambda path, take: peer.read(path, files[path].size, take), "another node")
            except StorageError as error:
                raise PeerLost(str(error)) from None
        (self.root / f"{origin.revision}.json").write_text(json.dumps(files))
        return LocalModel(part.rename(self.root / origin.revision), files)

    def _make_room(self, needed: int) -> None:
        """Removes models that nobody uses, the least recently used first, until there is room for so many bytes."""
        present = sorted((path for path in self.root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in present}
        total = sum(sizes.values())
        for path in present:
            if total + needed <= self._max_bytes:
                return
            with _alone(self.root / f"{path.name.lstrip('.')}.lock") as is_alone:
                if is_alone:
                    log.info("%s is removed to make room for another model", path)
                    shutil.rmtree(path, ignore_errors=True)
                    total -= sizes[path]


def fetch_files(
    files: Files, directory: Path, read: Callable[[str, Callable[[bytes], object]], None], source: str
) -> None:
    """Fetches those files of a model that a directory does not have yet.

    Args:
        files: the files.
        directory: where they go.
        read: hands on the content of a file, by its path, in order.
        source: who is asked, for a person.

    Raises:
        StorageError: a file is not what it was said to be, or what `read` raises.
    """

    def fetch(path: str) -> None:
        local, file = directory / path, files[path]
        if is_whole(local, file.size, file.digest):
            return
        local.parent.mkdir(parents=True, exist_ok=True)
        with local.open("wb") as opened:
            read(path, opened.write)
            opened.flush()
            os.fsync(opened.fileno())
        if not is_whole(local, file.size, file.digest):
            local.unlink()
            raise StorageError(f"{path} of {source} is not what it was when the job began")

    with ThreadPoolExecutor(FETCH_THREADS, "model") as pool:
        for _ in pool.map(fetch, files):
            pass


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
