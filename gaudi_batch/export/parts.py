"""Writes the parts of an export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from gaudi_batch.export.plan import Part
from gaudi_batch.export.source import READ_THREADS, ImageAt, Span, locate, read_images, scattered
from gaudi_batch.export.workers import workers
from gaudi_batch.output import manifest
from gaudi_batch.output.formats import WRITERS
from gaudi_batch.storage.scratch import scratch_directory, scratch_errors
from gaudi_batch.storage.store import Storage

USE = "write a part of the export"


@dataclass(frozen=True)
class PartTask:
    """A part to be written."""

    part: Part
    described: pa.Table
    """What its rows say of their images."""
    images: Sequence[ImageAt | None]
    """Where the run has them."""
    names: Sequence[str]
    """Their file names."""
    output_format: str

    @property
    def directory(self) -> str:
        """Where its objects lie."""
        return self.part.path if self.output_format == manifest.FILES else self.part.path.rpartition("/")[0]

    @property
    def written(self) -> Sequence[str]:
        """The names of its objects there."""
        return self.names if self.output_format == manifest.FILES else [self.part.path.rpartition("/")[2]]


def is_written(task: PartTask, listed: Sequence[str]) -> bool:
    """Whether a part is there, from the names that lie where it is to lie.

    Args:
        task: the part.
        listed: the names in its directory.
    """
    return set(task.written) <= set(listed)


def write_tasks(source: Storage, target: Storage, tasks: Sequence[PartTask], address: str | None) -> Iterator[Part]:
    """Writes parts in parallel; yields each that is written.

    Args:
        source: the output of the run.
        target: the destination.
        tasks: the parts.
        address: as in `workers`.

    Raises:
        InputError: no cluster answers.
        StorageError: storage failed, or an image is not what its manifest says.
    """
    with workers(address) as for_each:
        objects = scattered([task.images for task in tasks])
        spans = dict(for_each(locate, [source], objects))
        located = [replace(task, images=[_located(image, spans) for image in task.images]) for task in tasks]
        for task, _ in for_each(write_part, [source, target], located):
            yield task.part


def _located(image: ImageAt | None, spans: Mapping[str, Mapping[str, Span]]) -> ImageAt | None:
    if image is None or image.member is None or image.path not in spans:
        return image
    return image._replace(span=spans[image.path].get(image.member))


def write_part(source: Storage, target: Storage, task: PartTask) -> None:
    """Writes a part whole; of files, those that are not there yet.

    Args:
        source: the output of the run.
        target: the destination.
        task: the part.

    Raises:
        StorageError: storage failed, or an image is not what its manifest says.
    """
    if task.output_format == manifest.FILES:
        _write_files(source, target, task)
        return
    with scratch_directory(USE) as directory, scratch_errors(USE):
        path = Path(directory) / "part"
        with path.open("wb") as file:
            WRITERS[task.output_format](file, task.described, task.names, read_images(source, task.images))
        target.put_file(task.part.path, str(path))


def _write_files(source: Storage, target: Storage, task: PartTask) -> None:
    stored = set(target.names(task.part.path))
    missing = [number for number, name in enumerate(task.names) if name not in stored]
    images = [task.images[number] for number in missing]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        puts = []
        for number, data in zip(missing, read_images(source, images), strict=True):
            assert data is not None
            puts.append(pool.submit(target.put, f"{task.part.path}/{task.names[number]}", data))
            if len(puts) >= 4 * READ_THREADS:
                puts.pop(0).result()
        for put in puts:
            put.result()
