"""Models on a node's own disk: fetched once a node, from their origin or from another node, and there as a whole or not
at all.

Each has a directory, named by its revision, with a list of its files in it, and beside it two locks. Who fetches a
model holds the one, and the other cards of the node wait; who uses it holds the other together with them until its
process ends, so that nobody removes it meanwhile. The system frees a lock when its process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.pipelines.digests import is_whole

log = logging.getLogger(__name__)

FETCH_THREADS = 8
"""Files of a model that are fetched at the same time."""
LISTING = ".files.json"
"""The list of a model's files, in its directory."""
PART = ".part"
"""What is added to the name of a file that is being fetched."""
DIRECTORY = "GAUDI_BATCH_MODELS"
"""The variable that names another directory for models."""
GIGABYTES = "GAUDI_BATCH_MODELS_GB"
"""The variable that says how large that may become."""
DEFAULT_GIGABYTES = 200


class PeerLost(Exception):
    """Another node can't give a model any more."""


class ModelFile(NamedTuple):
    """A file of a model."""

    size: int
    """Bytes."""
    digest: str | None
    """Of its bytes, see digests.py; None where its origin tells none."""


Files: TypeAlias = Mapping[str, ModelFile]
"""The files of a model by their paths in its directory."""


class LocalModel(NamedTuple):
    """A model on this node's disk."""

    directory: Path
    files: Files
    is_whole: bool = True
    """False where nobody knows whether it has all files; no other node gets it then."""


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
        """Lets other nodes fetch a whole model from this one."""


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
            for path in self.root.glob("..*"):
                shutil.rmtree(path, ignore_errors=True)  # a process that was killed was removing it
            present = [path for path in self.root.iterdir() if path.is_dir()]
            sizes = {path: _bytes_in(path) for path in present}
            for path in sorted(present, key=_last_used):
                if sum(sizes.values()) + needed <= self._max_bytes and needed <= shutil.disk_usage(self.root).free:
                    break
                with _alone(self.root / f"{path.name.lstrip('.')}.lock") as is_alone:
                    if is_alone:
                        log.info("%s is removed to make room for another model", path)
                        removed = path.rename(self.root / f"..{path.name}")  # else a half would pass for the whole
                        shutil.rmtree(removed, ignore_errors=True)
                        del sizes[path]
            free = shutil.disk_usage(self.root).free
        finally:
            os.close(lock)
        if needed > free:
            raise StorageError(
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


def fetch_files(
    files: Files, directory: Path, read: Callable[[str, Callable[[bytes], object]], None]
) -> dict[str, ModelFile]:
    """Fetches those files of a model that a directory does not have yet.

    Args:
        files: the files.
        directory: where they go.
        read: hands on the content of a file, by its path, in order.

    Returns:
        The files with the SHA-256 of what is there now.

    Raises:
        StorageError: a file is not as large as it was said to be, or what `read` raises.
    """

    def fetch(path: str) -> ModelFile:
        local, size = directory / path, files[path].size
        if not is_whole(local, size, None):  # a file gets its name when it is on the disk as a whole
            local.parent.mkdir(parents=True, exist_ok=True)
            part = local.with_name(local.name + PART)
            with part.open("wb") as opened:
                read(path, opened.write)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(local)
        if local.stat().st_size != size:
            local.unlink()
            raise StorageError(f"{path} has not the {size} bytes that it had when the job began", refused=True)
        return ModelFile(size, _sha256(local))

    with ThreadPoolExecutor(FETCH_THREADS, "model") as pool:
        return dict(zip(files, pool.map(fetch, files), strict=True))


def wrong_files(files: Files, fetched: Files, directory: Path) -> list[str]:
    """Removes those files from a directory that are not what their digests say; returns their paths.

    Args:
        files: what they should be.
        fetched: what is there, as `fetch_files` says.
        directory: where they are.
    """
    wrong = [
        path
        for path, file in files.items()
        if file.digest not in (None, fetched[path].digest)
        and ((file.digest or "").startswith("sha256:") or not is_whole(directory / path, file.size, file.digest))
    ]
    for path in wrong:
        (directory / path).unlink()
    return wrong


def _sha256(file: Path) -> str:
    hasher = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            hasher.update(chunk)
    return f"sha256:{hasher.hexdigest()}"


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
