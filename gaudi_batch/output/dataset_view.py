"""The committed manifests of a run as one dataset, while the run goes on and afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import pyarrow.dataset as ds

from gaudi_batch.errors import InputError
from gaudi_batch.layout import JOINED, manifest_path
from gaudi_batch.output.manifest import COLUMNS
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.rollup import counting
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.totals import is_current
from gaudi_batch.storage.arrow import arrow_filesystem
from gaudi_batch.storage.store import Storage


def data_files(
    output: str | PathLike[str], storage_options: Mapping[str, Any] | None = None, retry_timeout_s: float = 60.0
) -> list[str]:
    """The objects of a run of format webdataset or parquet that hold committed images, in order of their shards: what
    to open of a run that goes on or has stopped. Of a complete run they are all that lies in `data`.

        >>> from gaudi_batch import data_files
        >>> data_files("out")[0].endswith(".tar")
        True

    An object with rows that are made again is left out from when the first of them is committed.

    Args:
        output: of a job, as for `load_manifest`.
        storage_options: fsspec options of its storage.
        retry_timeout_s: seconds for which storage that fails is tried again.

    Returns:
        A path or URL each; of a run of format files, none.

    Raises:
        InputError: there is no run in the output.
        StorageError: storage refused, or failed for longer than `retry_timeout_s`.
    """
    reader, info = _opened(output, storage_options, retry_timeout_s)
    reader.plan(info.rows)  # says which shards are retired
    rows_of: dict[tuple[int, str], list[int]] = {}
    latest: dict[int, int] = {}
    for commit, table in reader.commits():
        if commit.again:
            latest.update(dict.fromkeys(table.column("row").to_pylist(), commit.shard))
        if commit.has_members and commit.object_sha256:
            images = table.filter(ds.field("path").is_valid())
            rows_of[commit.shard, images.column("path")[0].as_py()] = images.column("row").to_pylist()
    return [
        f"{reader.storage.place}/{path}"
        for (shard, path), rows in rows_of.items()
        if not any(latest.get(row, shard) > shard for row in rows)
    ]


def load_manifest(
    output: str | PathLike[str], storage_options: Mapping[str, Any] | None = None, retry_timeout_s: float = 60.0
) -> ds.Dataset:
    """The manifest of an output as a pyarrow dataset: a row for each image and each failed row that is committed.

    It says what was committed when it was called. Of a run that is complete it reads `manifest.parquet`; of one that
    goes on or has stopped, the manifests of its shards, without the rows that were made again since. Nothing is read
    into memory before the dataset is.

        >>> from gaudi_batch import load_manifest
        >>> manifest = load_manifest("out")
        >>> manifest.count_rows()
        4
        >>> manifest.to_table(columns=["row", "path"]).column("row").to_pylist()
        [0, 1, 2, 3]

    Args:
        output: of a job: a directory, or a URL of S3, Google Cloud Storage or Azure.
        storage_options: fsspec options of its storage.
        retry_timeout_s: seconds for which storage that fails is tried again.

    Raises:
        InputError: there is no run in the output.
        StorageError: storage refused, or failed for longer than `retry_timeout_s`.
    """
    return open_committed(output, storage_options, retry_timeout_s).manifest


@dataclass(frozen=True)
class CommittedRun:
    """What is committed of a run."""

    reader: OutputReader
    info: RunInfo
    manifest: ds.Dataset
    is_complete: bool


def open_committed(
    output: str | PathLike[str], storage_options: Mapping[str, Any] | None = None, retry_timeout_s: float = 60.0
) -> CommittedRun:
    """The same as `load_manifest`, with what else is known of the run."""
    reader, info = _opened(output, storage_options, retry_timeout_s)
    storage = reader.storage
    filesystem = arrow_filesystem(storage.filesystem)
    plan, committed = reader.plan(info.rows), reader.committed_shards()
    if is_current(reader.get_json("summary.json") or {}, info.rows, len(plan), len(committed)):
        joined = ds.dataset(storage.full(JOINED), filesystem=filesystem, format="parquet")
        return CommittedRun(reader, info, joined, is_complete=True)
    paths: list[str] = []
    latest: dict[int, int] = {}
    for commit, table in reader.commits():
        paths.append(storage.full(manifest_path(commit.shard)))
        if commit.again:
            latest.update(dict.fromkeys(table.column("row").to_pylist(), commit.shard))
    if not paths:
        return CommittedRun(reader, info, ds.dataset(COLUMNS.empty_table()), is_complete=False)
    dataset = ds.dataset(paths, filesystem=filesystem, format="parquet")
    if latest:
        dataset = dataset.filter(counting(latest))
    return CommittedRun(reader, info, dataset, is_complete=False)


def _opened(
    output: str | PathLike[str], storage_options: Mapping[str, Any] | None, retry_timeout_s: float
) -> tuple[OutputReader, RunInfo]:
    """The records of the run in an output. Raises InputError if there is none."""
    storage = Storage(fspath(output), storage_options, retry_timeout_s, read_only=True)
    reader = OutputReader(storage)
    info = reader.run()
    if info is None:
        raise InputError(f"{storage.url}: there is no run here (no run.json)")
    return reader, info
