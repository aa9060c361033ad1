"""An export: what the manifests of a run name, and nothing else, in another place, format and packing.

All is planned from the manifests and from listings. The plan stands in the destination before the first image: the same
command goes on with what is not there yet, and another one is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.dataset.columns import cast, plain
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.export.names import DEFAULT_TEMPLATE, Template
from gaudi_batch.export.parts import PartTask, Spans, is_written, located, write_tasks
from gaudi_batch.export.plan import Cuts, Part, cut, in_order, parse_size, parts_of
from gaudi_batch.export.record import RECORD, cuts_of, digest, put_record
from gaudi_batch.export.selection import Splits, select, takes_failed
from gaudi_batch.export.source import ImageAt, places, sizes
from gaudi_batch.layout import METADATA
from gaudi_batch.output import manifest
from gaudi_batch.output.dataset_view import CommittedRun, open_committed
from gaudi_batch.output.formats.encoding import SUFFIXES
from gaudi_batch.output.formats.image_folder import ImageFolder
from gaudi_batch.storage.reading import ReadableStorage
from gaudi_batch.storage.scratch import scratch_directory, scratch_errors
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted

log = logging.getLogger(__name__)

CARD, ASSETS = "README.md", "assets"
"""The dataset card, and the directory of its pictures."""
OWN_NAMES = (CARD, ASSETS)
RETRY_TIMEOUT_S = 600.0
"""Seconds for which storage that fails is tried again."""


@dataclass(frozen=True)
class ExportRequest:
    """What is to be exported, and how."""

    output: str
    """Of a run."""
    target: str
    """A directory or a URL, where nothing is but an earlier try of the same export."""
    format: str = "parquet"
    """As a job's."""
    target_size: str = "500MB"
    """Of an object, about."""
    filters: Sequence[str] = ()
    """See `select`."""
    split: str | None = None
    """See `Splits`."""
    name: str = DEFAULT_TEMPLATE
    """See `Template`."""
    complete: bool = False
    """Whether a run that is not complete is refused."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """fsspec options of the run's storage."""
    target_options: Mapping[str, Any] | None = field(default=None, repr=False)
    """Those of the target's; None takes the run's, where both are on one protocol."""


@dataclass(frozen=True)
class Export:
    """An export, planned."""

    run: CommittedRun
    target: Storage
    format: str
    rows: pa.Table
    """Its rows of the manifest, in order."""
    failures: pa.Table
    """Failed rows of the run, whether they are in it or not."""
    parts: Sequence[Part]
    tasks: Sequence[PartTask]
    digest: str
    """Of all that decides what is written."""
    spans: Spans = field(default_factory=dict)
    """See `write_tasks`."""
    filters: Sequence[str] = ()
    """By which its rows were chosen."""
    split: str | None = None
    """By what they were split."""

    @property
    def cuts(self) -> Cuts:
        """How it is packed."""
        cuts: dict[str, list[int]] = {}
        for part in self.parts:
            cuts.setdefault(part.split, []).append(part.stop)
        return cuts

    @property
    def splits(self) -> dict[str, int]:
        """How many rows each split has."""
        counts: dict[str, int] = {}
        for part in self.parts:
            counts[part.split] = counts.get(part.split, 0) + part.stop - part.start
        return counts


def plan_export(request: ExportRequest) -> Export:
    """Finds out what an export is to write; writes nothing.

    Raises:
        InputError: it can't be done as it was asked for.
        StorageError: storage failed, or images of the run are not there.
    """
    target_size = parse_size(request.target_size)
    run = open_committed(request.output, request.storage_options, RETRY_TIMEOUT_S)
    source, target = run.reader.storage, _target(request)
    require_outside(target, source)
    if not run.is_complete:
        if request.complete:
            raise InputError(f"{source.url}: the run is not complete; without --complete what is committed is exported")
        log.warning("%s: the run is not complete; what is committed is exported", source.url)
    every = _plain(run.manifest.to_table())
    rows = select(every, request.filters)
    if not len(rows):
        raise InputError(
            f"{source.url}: none of {len(every)} committed rows passes{' the filters' if request.filters else ''}"
        )
    output_format = request.format
    template = Template(request.name, rows.column_names)
    rows, splits = in_order(rows, Splits(request.split, rows.column_names).of(rows))
    has_members = run.info.job.get("format", manifest.FILES) != manifest.FILES
    images = places(rows, has_members=has_members)
    if output_format == manifest.FILES and None in images:
        raise InputError("failed rows have no image; format webdataset or parquet takes them, files do not")
    suffix = SUFFIXES[run.info.job.get("encoding", {}).get("type", "png")]
    names = [f"{name}.{suffix}" for name in template.names(rows)]
    described = manifest.described(rows, has_members=has_members)
    if takes_failed(request.filters):
        described = described.append_column("status", rows["status"]).append_column("error", rows["error"])
    packing = None if output_format == manifest.FILES else target_size
    its_digest = digest(
        {"run": run.info.run_id, "format": output_format, "packing": packing, "columns": described.column_names},
        zip(splits, names, (None if image is None else image.sha256 for image in images), strict=True),
    )
    # The bytes of an object that was torn, and has been made again since, would pack the rest in another way.
    cuts = cuts_of(target.get(RECORD), its_digest)
    if cuts is None:
        counts = {pair["values"]: pair["counts"] for pair in pc.value_counts(every["path"]).to_pylist()}
        cuts = cut(splits, sizes(source, images, counts), output_format, target_size)
    parts = parts_of(cuts, output_format)
    tasks = [
        PartTask(
            part,
            described.slice(part.start, part.stop - part.start),
            images[part.start : part.stop],
            names[part.start : part.stop],
            output_format,
        )
        for part in parts
    ]
    failures = every.filter(pc.equal(every["status"], "failed"))
    return Export(
        run,
        target,
        output_format,
        rows,
        failures,
        parts,
        tasks,
        its_digest,
        filters=request.filters,
        split=request.split,
    )


def require_outside(target: Storage, run: ReadableStorage) -> None:
    """Makes sure that a destination does not lie within a run, whose loaders would find it.

    Raises:
        InputError: it does.
        StorageError: storage failed.
    """
    place, whole = (os.path.realpath(each.root) if each.local else each.root for each in (target, run))
    if type(target.filesystem) is not type(run.filesystem) or not f"{place}/".startswith(f"{whole.rstrip('/')}/"):
        return
    # In a store of the same kind at another address, a place of the same name is another.
    if target.local or target.at(run.root).get("run.json") == run.get("run.json"):
        raise InputError(
            f"{target.url} lies within the run {run.url}, whose loaders would find it; name a place outside it"
        )


def _target(request: ExportRequest) -> Storage:
    options = request.target_options
    if options is None:
        protocol, is_url, _ = request.target.partition("://")
        options = request.storage_options if is_url and request.output.startswith(f"{protocol}://") else {}
    return Storage(request.target, options, RETRY_TIMEOUT_S)


def _plain(rows: pa.Table) -> pa.Table:
    schema = plain(rows.schema.remove_metadata())
    return pa.table([cast(*each) for each in zip(rows.columns, schema.types, strict=True)], schema=schema)


def begin(export: Export) -> None:
    """Puts the record of an export in its destination, unless it is there.

    Raises:
        InputError: the destination holds something else.
        StorageError: storage failed.
    """
    record = {
        "digest": export.digest,
        "run": export.run.info.run_id,
        "format": export.format,
        "images": len(export.rows),
        "objects": len(export.parts),
        "cuts": export.cuts,
    }
    put_record(export.target, record)


def write_parts(export: Export, address: str | None) -> None:
    """Writes the parts that are not there yet, in parallel.

    Args:
        export: begun.
        address: of a Ray cluster whose nodes do it; None is this process.

    Raises:
        InputError: no cluster answers.
        StorageError: storage failed, or an image is not what its manifest says.
    """
    source, target = export.run.reader.storage, export.target
    listings = _listings(export)
    todo = [task for task in export.tasks if not is_written(task, listings[task.directory])]
    if len(todo) < len(export.tasks):
        log.info("%d of %d parts are there already", len(export.tasks) - len(todo), len(export.tasks))
    for done, part in enumerate(write_tasks(source, target, todo, address, export.spans), 1):
        log.info("%s: %s (%d of %d)", part.path, counted(part.stop - part.start, "image"), done, len(todo))
    listings = _listings(export)
    if missing := [task.part.path for task in export.tasks if not is_written(task, listings[task.directory])]:
        raise StorageError(
            f"{target.url}: {counted(len(missing), 'part')} that {'was' if len(missing) == 1 else 'were'} written can't"
            f" be seen from here, the first {missing[0]}; the nodes and this machine must share the destination"
        )


def _listings(export: Export) -> dict[str, list[str]]:
    """What lies where the parts are to lie. Raises InputError if a name is none of this export's: whoever loads the
    directory would take it for a part."""
    target = export.target
    names: dict[str, set[str]] = {"": {*OWN_NAMES}}
    for task in export.tasks:
        names[""].add(task.part.path.partition("/")[0])
        names.setdefault(task.directory, set()).update(task.written)
        if export.format == manifest.FILES:
            names.setdefault(task.part.split, {METADATA}).add(task.part.path.rpartition("/")[2])
    listings = {directory: target.names(directory) for directory in names}
    for directory, listed in listings.items():
        if others := [name for name in listed if name not in names[directory] and not name.startswith(".")]:
            path = f"{directory}/{others[0]}".lstrip("/")
            raise InputError(
                f"{target.url} holds something else beside this export, {path!r}; remove it, or name another place"
            )
    return listings


def describe_files(export: Export) -> None:
    """Writes what loaders of image folders need to know, and removes what processes that were killed were writing.

    Raises:
        StorageError: storage failed.
    """
    target = export.target
    if export.format == manifest.FILES:
        use = "describe the images"
        for split in export.splits:
            with scratch_directory(use) as directory, scratch_errors(use):
                path = Path(directory) / METADATA
                folder = ImageFolder(path)
                for task in export.tasks:
                    if task.part.split == split:
                        folder_name = task.part.path.rpartition("/")[2]
                        names = pa.chunked_array([[f"{folder_name}/{name}" for name in task.names]], pa.string())
                        folder.add(names, task.described)
                folder.close()
                put_if_new(target, f"{split}/{METADATA}", path.read_bytes())
    paths = {part.path for part in export.parts}
    for place in sorted({"", *paths, *(path.rpartition("/")[0] for path in paths)}):
        for name in target.unfinished(place):
            target.remove(f"{place}/{name}".lstrip("/"))


def put_if_new(target: Storage, path: str, data: bytes) -> None:
    """Writes an object unless it has these bytes already: a push takes a file that was written again for another."""
    if target.get(path) != data:
        target.put(path, data)


def some_images(export: Export, count: int) -> list[tuple[ImageAt, str]]:
    """Images from all of an export, with their prompts; none that is not safe for work."""
    images = [image for task in export.tasks for image in located(task.images, export.spans)]
    prompts, nsfw = export.rows["prompt"].to_pylist(), export.rows["nsfw"].to_pylist()
    safe = [
        (image, prompt)
        for image, prompt, is_nsfw in zip(images, prompts, nsfw, strict=True)
        if image is not None and not is_nsfw
    ]
    step = max(1, len(safe) // count)
    return safe[::step][:count]
