"""Format `parquet`: images and what describes them in one table, as Hugging Face's `Image` column has them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.output.formats.loadable import loadable
from gaudi_batch.output.manifest import renamed

IMAGE = "image"
IMAGE_FIELD = pa.field(IMAGE, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
"""The image file and its name."""
FEATURES = {b"huggingface": json.dumps({"info": {"features": {IMAGE: {"_type": "Image"}}}}).encode()}
"""Metadata of the schema by which `datasets` and the hub's viewer know that the column has images. What is not in it
they derive from the type."""
ROW_GROUP_ROWS = 100
"""Most rows of a row group: what `datasets` gives tables of images, and what the hub's viewer shows at a time."""
ROW_GROUP_BYTES = 16 << 20
"""Bytes of images at which a row group ends. Whoever wants one image reads its whole row group, in a fifth of a second
at 100 MB/s; a row group costs some 2 KB of footer, which is read before anything else."""


def write_parquet(file: BinaryIO, described: pa.Table, names: Sequence[str], images: Iterable[bytes | None]) -> None:
    """Writes a Parquet file; see `WriteObject`. At most one row group is in memory."""
    table = loadable(described)
    table = table.rename_columns(renamed(table.schema, [IMAGE]).names)
    others = table.schema
    schema = pa.schema([IMAGE_FIELD, *others], metadata=FEATURES)
    described_leaves = [path for path in _leaves(schema) if not path.startswith(f"{IMAGE}.")]
    with pq.ParquetWriter(
        file,
        schema,
        # An image is compressed already, is there once, and is not searched by its first bytes.
        compression={f"{IMAGE}.bytes": "none", f"{IMAGE}.path": "zstd", **dict.fromkeys(described_leaves, "zstd")},
        use_dictionary=described_leaves,
        write_statistics=described_leaves,
        write_page_index=True,
    ) as writer:
        start = 0
        for group in _groups(zip(images, names, strict=True)):
            column = pa.StructArray.from_arrays(
                [pa.array([data for data, _ in group], pa.binary()), pa.array([name for _, name in group])],
                fields=list(IMAGE_FIELD.type),
                mask=pa.array([data is None for data, _ in group]),
            )
            rows = table.slice(start, len(group)).combine_chunks()
            writer.write_table(pa.table([column, *rows.columns], schema=schema), row_group_size=len(group))
            start += len(group)


def _groups(images: Iterable[tuple[bytes | None, str]]) -> Iterable[list[tuple[bytes | None, str]]]:
    """The images of each row group."""
    group: list[tuple[bytes | None, str]] = []
    size = 0
    for data, name in images:
        if group and (len(group) >= ROW_GROUP_ROWS or size + len(data or b"") > ROW_GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append((data, name))
        size += len(data or b"")
    if group:
        yield group


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of the columns in a Parquet file of this schema."""
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer)
    columns = pq.ParquetFile(buffer).schema
    return [columns.column(index).path for index in range(len(columns))]
