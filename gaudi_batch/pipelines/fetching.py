"""The files of a model, who gives them, and how they come onto a node's disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from gaudi_batch.errors import StorageError
from gaudi_batch.pipelines.digests import is_whole

FETCH_THREADS = 8
"""Files of a model that are fetched at the same time."""
PART = ".part"
"""What is added to the name of a file that is being fetched."""


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
