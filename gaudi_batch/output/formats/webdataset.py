"""Format `webdataset`: a tar file with an image and a JSON object for each sample, in order."""

from __future__ import annotations

import base64
import io
import json
import math
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.dataset.arrow import is_text, python_rows
from gaudi_batch.output.formats.loadable import loadable

BUFFER_BYTES = 1 << 20


def write_tar(file: BinaryIO, described: pa.Table, names: Sequence[str], images: Iterable[bytes | None]) -> None:
    """Writes a tar file; see `WriteObject`. Its members have no time and no owner, which would differ each time."""
    rows = python_rows(_without_null_texts(loadable(described, microseconds=True)))
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, bufsize=BUFFER_BYTES) as tar:
        for row, name, image in zip(rows, names, images, strict=True):
            if image is not None:
                _add(tar, name, image)
            _add(tar, f"{name.partition('.')[0]}.json", json_of(row))


def _without_null_texts(table: pa.Table) -> pa.Table:
    """A table with "" in place of null texts: `datasets` takes a field that is null in the first samples for one that
    is null in all, and fails at the first text."""
    for place, field in enumerate(table.schema):
        if is_text(field.type):
            table = table.set_column(place, field.name, pc.fill_null(table.column(place), ""))
    return table


def json_of(row: Mapping[str, Any]) -> bytes:
    """A row as a JSON object, with every column, so that loaders see the same fields in each sample."""
    return json.dumps(_plain(row), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _plain(value: Any) -> Any:
    """A value as JSON has it: bytes in base64, times as texts, what is not finite as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return str(value)
