"""Reads the images of a run, whatever its format, and checks each against its manifest."""

from __future__ import annotations

import hashlib
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.errors import StorageError
from gaudi_batch.layout import DATA
from gaudi_batch.output.formats.parquet import IMAGE
from gaudi_batch.output.manifest import MEMBER
from gaudi_batch.storage.reading import PART_BYTES
from gaudi_batch.storage.scratch import scratch_directory, scratch_errors
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted

READ_THREADS = 16
"""Images, or listings, that are read at the same time."""
USE = "read the images of a shard"
OVERHEAD = 2048
"""Bytes of an image's record beside it in an object of many: headers of a tar file and JSON."""


class ImageAt(NamedTuple):
    """Where an image is."""

    path: str
    member: str | None
    sha256: str


def places(rows: pa.Table, *, has_members: bool) -> list[ImageAt | None]:
    """Where the image of each row of a manifest is; None for a failed row.

    Args:
        rows: of the manifest.
        has_members: whether objects have many images.
    """
    paths, sums = rows.column("path").to_pylist(), rows.column("sha256").to_pylist()
    members = rows.column(MEMBER).to_pylist() if has_members else [None] * len(rows)
    return [
        None if path is None else ImageAt(path, member, digest)
        for path, member, digest in zip(paths, members, sums, strict=True)
    ]


def sizes(storage: Storage, images: Sequence[ImageAt | None]) -> list[int]:
    """The bytes of each image, by listings alone: of an image in an object with others, their mean.

    Raises:
        StorageError: storage failed, or an image is not there.
    """
    members: dict[str, int] = {}
    for image in images:
        if image is not None:
            members[image.path] = members.get(image.path, 0) + 1
    directories = sorted({path.rpartition("/")[0] for path in members})
    with ThreadPoolExecutor(READ_THREADS) as pool:
        listings = dict(zip(directories, pool.map(storage.entries, directories), strict=True))
    known: dict[str, int] = {}
    for path, count in members.items():
        directory, _, name = path.rpartition("/")
        entry = listings[directory].get(name)
        if entry is not None:
            known[path] = entry.size if directory != DATA else max(1, entry.size // count - OVERHEAD)
    if missing := [path for path in members if path not in known]:
        raise StorageError(
            f"{storage.url}: {counted(len(missing), 'object')} of images that the manifest names"
            f" {'is' if len(missing) == 1 else 'are'} not there, the first {missing[0]};"
            " the run's command with --repair makes them again",
            refused=True,
        )
    return [0 if image is None else known[image.path] for image in images]


def read_images(storage: Storage, images: Sequence[ImageAt | None]) -> Iterator[bytes | None]:
    """The bytes of images, in order.

    Raises:
        StorageError: storage failed, or an image is not there or not what its manifest says.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool, scratch_directory(USE) as directory:
        opened = _Objects(storage, directory)
        pending: deque[Future[bytes | None]] = deque()
        remaining = iter(images)
        for image in remaining:
            if image is not None and image.path.startswith(f"{DATA}/"):
                with scratch_errors(USE):
                    data = opened.read(image)
                pending.append(_done(_whole(storage, image, data)))
            elif image is None:
                pending.append(_done(None))
            else:
                pending.append(pool.submit(lambda at: _whole(storage, at, storage.get(at.path)), image))
            if len(pending) >= 2 * READ_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _done(data: bytes | None) -> Future[bytes | None]:
    future: Future[bytes | None] = Future()
    future.set_result(data)
    return future


def _whole(storage: Storage, image: ImageAt, data: bytes | None) -> bytes:
    """The bytes, if they are those that the manifest names."""
    if data is None or hashlib.sha256(data).hexdigest() != image.sha256:
        where = image.path if image.member is None else f"{image.path}: {image.member}"
        raise StorageError(
            f"{storage.url}: {where} is {'not there' if data is None else 'not what its manifest says'}; the run's"
            " command with --repair makes it again",
            refused=True,
        )
    return data


class _Members(Protocol):
    """An object of many images, open."""

    def read(self, member: str) -> bytes | None:
        """The bytes of an image; None where it is not there."""


class _Objects:
    """Objects of many images, one of which is on this disk at a time: images come in the order of their objects."""

    def __init__(self, storage: Storage, directory: str) -> None:
        self._storage, self._file = storage, Path(directory) / "object"
        self._path, self._members = "", _Absent()  # type: str, _Members

    def read(self, image: ImageAt) -> bytes | None:
        """The bytes of an image; None where it is not there. Raises StorageError."""
        if image.path != self._path:
            self._members = self._opened(image.path)
            self._path = image.path
        assert image.member is not None
        try:
            return self._members.read(image.member)
        except (tarfile.TarError, pa.ArrowException, OSError):  # pyarrow calls a torn file so, too
            return None

    def _opened(self, path: str) -> _Members:
        entry = self._storage.entry(path)
        if entry is None:
            return _Absent()
        with self._file.open("wb") as file:
            for start in range(0, entry.size, PART_BYTES):
                file.write(self._storage.get_range(path, start, min(entry.size, start + PART_BYTES)))
        try:
            return _Tar(self._file) if path.endswith(".tar") else _Parquet(self._file)
        except (tarfile.TarError, pa.ArrowException, OSError):
            return _Absent()


class _Absent:
    def read(self, member: str) -> bytes | None:
        return None


class _Tar:
    def __init__(self, path: Path) -> None:
        self._path = path
        with tarfile.open(path) as tar:
            self._places: Mapping[str, tuple[int, int]] = {
                member.name: (member.offset_data, member.size) for member in tar if member.isfile()
            }

    def read(self, member: str) -> bytes | None:
        if member not in self._places:
            return None
        start, size = self._places[member]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(size)


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        self._groups: dict[str, int] = {}
        for group in range(self._file.num_row_groups):
            names = self._file.read_row_group(group, columns=[f"{IMAGE}.path"]).column(IMAGE)
            self._groups |= {name["path"]: group for name in names.to_pylist() if name is not None}
        self._group = -1
        self._images: dict[str, bytes] = {}

    def read(self, member: str) -> bytes | None:
        group = self._groups.get(member)
        if group is None:
            return None
        if group != self._group:
            images = self._file.read_row_group(group, columns=[IMAGE]).column(IMAGE).to_pylist()
            self._images = {image["path"]: image["bytes"] for image in images if image is not None}
            self._group = group
        return self._images.get(member)
