"""Reads the images of a run, whatever its format, and checks each against its manifest."""

from __future__ import annotations

import hashlib
import itertools
import tarfile
from collections import Counter, deque
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
MAX_OPENED = 2
"""Times that an object of many images is read whole. One whose rows lie so scattered that it would be read more often
is read once to see where its images are, and then image by image."""
Span = tuple[int, int]
"""The first byte of an image in its object, and the one after it."""


class ImageAt(NamedTuple):
    """Where an image is."""

    path: str
    member: str | None
    sha256: str
    span: Span | None = None
    """Where it lies in an object of many, if that is known."""

    @property
    def is_packed(self) -> bool:
        """Whether it is in an object of many images."""
        return self.path.startswith(f"{DATA}/")


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


def sizes(storage: Storage, images: Sequence[ImageAt | None], members: Mapping[str, int]) -> list[int]:
    """The bytes of each image, by listings alone: of an image in an object with others, their mean.

    Args:
        storage: of the run.
        images: where they are.
        members: how many images each object has, these and others.

    Raises:
        StorageError: storage failed, or an image is not there.
    """
    paths = dict.fromkeys(image.path for image in images if image is not None)
    directories = sorted({path.rpartition("/")[0] for path in paths})
    with ThreadPoolExecutor(READ_THREADS) as pool:
        listings = dict(zip(directories, pool.map(storage.entries, directories), strict=True))
    known: dict[str, int] = {}
    for path in paths:
        directory, _, name = path.rpartition("/")
        entry = listings[directory].get(name)
        if entry is not None:
            known[path] = entry.size if directory != DATA else max(1, entry.size // members[path] - OVERHEAD)
    if missing := [path for path in paths if path not in known]:
        raise StorageError(
            f"{storage.url}: {counted(len(missing), 'object')} of images that the manifest names"
            f" {'is' if len(missing) == 1 else 'are'} not there, the first {missing[0]};"
            " the run's command with --repair makes them again",
            refused=True,
        )
    return [0 if image is None else known[image.path] for image in images]


def scattered(parts: Sequence[Sequence[ImageAt | None]]) -> list[str]:
    """The objects of many images that would be opened more than MAX_OPENED times.

    Args:
        parts: the images of each, in the order in which they are read.
    """
    opened: Counter[str] = Counter()
    for images in parts:
        packed = (image.path for image in images if image is not None and image.is_packed)
        opened.update(path for path, _ in itertools.groupby(packed))
    return [path for path, times in opened.items() if times > MAX_OPENED]


def locate(storage: Storage, path: str) -> Mapping[str, Span]:
    """Where each image lies in an object of many; none of those that can't be found. Raises StorageError."""
    with scratch_directory(USE) as directory, scratch_errors(USE):
        return _Objects(storage, directory).spans(path)


def read_images(storage: Storage, images: Sequence[ImageAt | None]) -> Iterator[bytes | None]:
    """The bytes of images, in order.

    Raises:
        StorageError: storage failed, or an image is not there or not what its manifest says.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool, scratch_directory(USE) as directory:
        opened = _Objects(storage, directory)
        pending: deque[Future[bytes | None]] = deque()
        for image in images:
            if image is None:
                pending.append(_done(None))
            elif image.is_packed and image.span is None:
                with scratch_errors(USE):
                    data = opened.read(image)
                pending.append(_done(_whole(storage, image, data)))
            else:
                pending.append(pool.submit(_read_one, storage, image))
            if len(pending) >= 2 * READ_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read_one(storage: Storage, image: ImageAt) -> bytes:
    data = storage.get(image.path) if image.span is None else storage.get_range(image.path, *image.span)
    return _whole(storage, image, data)


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

    def spans(self) -> Mapping[str, Span]:
        """Where each image lies."""


class _Objects:
    """Objects of many images, one of which is on this disk at a time."""

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

    def spans(self, path: str) -> Mapping[str, Span]:
        """Where each image of an object lies; none of those that can't be found. Raises StorageError."""
        try:
            return self._opened(path).spans()
        except (tarfile.TarError, pa.ArrowException, OSError):
            return {}

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

    def spans(self) -> Mapping[str, Span]:
        return {}


class _Tar:
    def __init__(self, path: Path) -> None:
        self._path = path
        with tarfile.open(path) as tar:
            self._spans: Mapping[str, Span] = {
                member.name: (member.offset_data, member.offset_data + member.size) for member in tar if member.isfile()
            }

    def read(self, member: str) -> bytes | None:
        if member not in self._spans:
            return None
        start, stop = self._spans[member]
        with self._path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def spans(self) -> Mapping[str, Span]:
        return self._spans


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path, self._file = path, pq.ParquetFile(path)
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
            self._images = self._images_of(group)
            self._group = group
        return self._images.get(member)

    def spans(self) -> Mapping[str, Span]:
        # Runs write images as they are, without compression, one after the other.
        spans: dict[str, Span] = {}
        with self._path.open("rb") as file:
            for group in range(self._file.num_row_groups):
                pages = self._pages(group)
                file.seek(pages.start)
                data, place = file.read(len(pages)), 0
                for member, image in self._images_of(group).items():
                    if (at := data.find(image, place)) >= 0:
                        place = at + len(image)
                        spans[member] = pages.start + at, pages.start + place
        return spans

    def _images_of(self, group: int) -> dict[str, bytes]:
        images = self._file.read_row_group(group, columns=[IMAGE]).column(IMAGE).to_pylist()
        return {image["path"]: image["bytes"] for image in images if image is not None}

    def _pages(self, group: int) -> range:
        """The bytes of the file with the images of a row group."""
        stored = self._file.metadata.row_group(group)
        columns = (stored.column(index) for index in range(stored.num_columns))
        chunk = next(column for column in columns if column.path_in_schema == f"{IMAGE}.bytes")
        return range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size)
