"""Writes the parts of an export."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence, Set
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
from gaudi_batch.text import counted

log = logging.getLogger(__name__)

FIRST_LOCATED = 8
"""Objects, about, that are read for the places of their images before the first parts are written; before the next
twice as many, and so on. So an export that is killed has written about as much as it reads again, and a large cluster
has much to do at the same time."""
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


Spans = MutableMapping[str, Mapping[str, Span]]
"""Where each image lies in objects of many, by path and name."""


def write_tasks(
    source: Storage, target: Storage, tasks: Sequence[PartTask], address: str | None, spans: Spans
) -> Iterator[Part]:
    """Writes parts in parallel; yields each that is written.

    Args:
        source: the output of the run.
        target: the destination.
        tasks: the parts.
        address: as in `workers`.
        spans: gets where the images of objects lie that are scattered over the parts.

    Raises:
        InputError: no cluster answers.
        StorageError: storage failed, or an image is not what its manifest says.
    """
    objects = set(scattered([task.images for task in tasks]))
    if objects:
        told = counted(len(objects), "object")
        log.info("images of %s lie scattered over the parts; each is read once to see where its images lie", told)
    done = 0
    with workers(address) as for_each:
        for together, unknown in _in_steps(tasks, objects):
            for path, of_object in for_each(locate, [source], unknown):
                spans[path] = of_object
                done += 1
                log.info("%s: where its images lie is known (%d of %d)", path, done, len(objects))
            placed = [replace(task, images=located(task.images, spans)) for task in together]
            for task, _ in for_each(write_part, [source, target], placed):
                yield task.part


def _in_steps(tasks: Sequence[PartTask], objects: Set[str]) -> Iterator[tuple[list[PartTask], list[str]]]:
    """Parts to be written together, and those of these objects that no part before has images of."""
    together: list[PartTask] = []
    unknown: list[str] = []
    seen: set[str] = set()
    limit = FIRST_LOCATED
    for task in tasks:
        together.append(task)
        paths = {image.path: None for image in task.images if image is not None and image.path in objects}
        unknown += [path for path in paths if path not in seen]
        seen |= paths.keys()
        if len(unknown) >= limit:
            yield together, unknown
            together, unknown, limit = [], [], 2 * limit
    if together:
        yield together, unknown


def located(images: Sequence[ImageAt | None], spans: Mapping[str, Mapping[str, Span]]) -> list[ImageAt | None]:
    """Images with where each lies in its object, as far as that is known."""
    return [
        image
        if image is None or image.member is None or image.path not in spans
        else image._replace(span=spans[image.path].get(image.member))
        for image in images
    ]


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
