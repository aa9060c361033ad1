"""The pictures of a report: some of each bucket and card, as small files, with what was asked for."""

from __future__ import annotations

import base64
import io
import logging
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gaudi_batch.errors import StorageError
from gaudi_batch.output.formats.parquet import IMAGE
from gaudi_batch.output.manifest import FILES, MEMBER
from gaudi_batch.output.records import RunRecords
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

MAX_PICTURES = 500
MAX_SIDE = 256
"""Most pixels of a side of a picture."""
QUALITY = 75
"""Of WebP: a picture of 256 x 256 has some 10 KB."""
MAX_OBJECTS = 100
"""Objects of many images that pictures are read from; the first images of each, since these are read at once."""
THREADS = 8
PICTURES_TIMEOUT_S = 30.0
"""Seconds after which a report does with the pictures that it has."""
BUFFER_BYTES = 1 << 18
MAX_TEXT = 2000
"""Characters of a prompt that are shown."""


@dataclass(frozen=True)
class Picture:
    """One picture."""

    data: str
    """The file as a data: URL."""
    row: Mapping[str, Any]
    """What the manifest says of the image."""
    bucket: str


def pictures(records: RunRecords, timeout_s: float = PICTURES_TIMEOUT_S) -> list[Picture]:
    """Up to MAX_PICTURES of a run's images, as evenly spread over its buckets and cards as there are images; fewer if
    images are gone, or reading takes too long.

    Args:
        records: of the run.
        timeout_s: how long reading may take, in seconds.
    """
    until = time.monotonic() + timeout_s
    storage = records.reader.storage
    chosen = _chosen(records)
    names = {shard.number: str(shard.bucket) for shard in records.plan}
    is_files = records.info.job.get("format", FILES) == FILES

    def read(shard: int, count: int) -> list[Picture]:
        if time.monotonic() > until:
            return []
        commit = records.reader.read_commit(shard)
        if commit is None:
            return []
        rows = [row for row in _rows_with_images(commit[1], records.latest_shard_of_row)]
        small_ones: list[Picture] = []
        for row, data in _images_of(storage, rows, count, is_files):
            if time.monotonic() > until:
                break
            small = _small(data)
            if small is not None:
                small_ones.append(Picture(small, row, names.get(shard, "")))
        return small_ones

    with ThreadPoolExecutor(THREADS) as pool:
        return [picture for part in pool.map(lambda item: _or_none(read, *item), chosen.items()) for picture in part]


def _or_none(read: Callable[[int, int], list[Picture]], shard: int, count: int) -> list[Picture]:
    try:
        return read(shard, count)
    except StorageError as error:
        log.debug("no picture of shard %d: %s", shard, error)
        return []


def _chosen(records: RunRecords) -> dict[int, int]:
    """Shards, with how many pictures are to come from each."""
    buckets = {shard.number: shard.bucket for shard in records.plan}
    groups: dict[tuple[Any, str], list[tuple[int, int]]] = {}
    for commit in records.commits:
        info = commit.info
        if info.images:
            groups.setdefault((buckets.get(info.shard), info.card), []).append((info.shard, info.images))
    is_files = records.info.job.get("format", FILES) == FILES
    total = sum(map(len, groups.values()))
    most_shards = total if is_files else MAX_OBJECTS
    wanted: dict[int, int] = {}
    sizes = [sum(images for _, images in group) for group in groups.values()]
    for share, shards in zip(_shares(sizes, MAX_PICTURES), groups.values(), strict=True):
        of_group = len(shards) if total <= most_shards else max(1, most_shards * len(shards) // total)
        count = min(of_group, share)
        taken = [shards[place * len(shards) // count] for place in range(count)]
        for (shard, _), pictures_of in zip(taken, _shares([images for _, images in taken], share), strict=True):
            if pictures_of:
                wanted[shard] = pictures_of
    return wanted


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """How many to take of each of some groups, at most `most` in all: as many of each as there are, and the rest of the
    larger ones."""
    shares = [0] * len(sizes)
    left, open_groups = most, [place for place, size in enumerate(sizes) if size]
    while left > 0 and open_groups:
        each = max(1, left // len(open_groups))
        for place in open_groups:
            take = min(each, sizes[place] - shares[place], left)
            shares[place] += take
            left -= take
        open_groups = [place for place in open_groups if shares[place] < sizes[place]]
    return shares


def _rows_with_images(table: pa.Table, latest_shard_of_row: Mapping[int, int]) -> Iterator[dict[str, Any]]:
    wanted = ("id", "row", "image_index", "status", "path", MEMBER, "seed", "prompt", "negative_prompt", "width")
    more = ("height", "steps", "guidance_scale", "nsfw", "truncated", "shard", "card")
    columns = [name for name in (*wanted, *more) if name in table.schema.names]
    for row in table.select(columns).to_pylist():
        if row["status"] == "ok" and latest_shard_of_row.get(row["row"], row["shard"]) == row["shard"]:
            yield row


def _images_of(
    storage: Storage, rows: Sequence[dict[str, Any]], count: int, is_files: bool
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Some rows, with the bytes of their images. Raises StorageError."""
    if is_files:
        for place in range(min(count, len(rows))):
            row = rows[place * len(rows) // min(count, len(rows))]
            data = storage.get(row["path"])
            if data is not None:
                yield row, data
        return
    by_member = {row[MEMBER]: row for row in rows}
    if rows:
        for member, data in _first_images(storage, rows[0]["path"]):
            if member in by_member:
                yield by_member[member], data
                count -= 1
            if not count:
                return


def _first_images(storage: Storage, path: str) -> Iterator[tuple[str, bytes]]:
    """The images of an object of many, from the first on. Raises StorageError."""
    file = io.BufferedReader(storage.open(path), BUFFER_BYTES)
    try:
        if path.endswith(".tar"):
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    content = None if member.name.endswith(".json") else tar.extractfile(member)
                    if content is not None:
                        yield member.name, content.read()
            return
        table = pq.ParquetFile(pa.PythonFile(file, mode="r"))
        for group in range(table.num_row_groups):
            for image in table.read_row_group(group, columns=[IMAGE]).column(IMAGE).to_pylist():
                if image is not None:
                    yield image["path"], image["bytes"]
    except (tarfile.TarError, pa.ArrowException, OSError) as error:
        log.debug("%s can't be read: %s", path, one_line(error))


def _small(data: bytes) -> str | None:
    """A picture no larger than MAX_SIDE; None if the bytes are no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))
            picture = image.convert("RGB")
        picture.thumbnail((MAX_SIDE, MAX_SIDE))
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        log.debug("a picture can't be read: %s", one_line(error))
        return None
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def describe(picture: Picture) -> dict[str, Any]:
    """A picture as the page has it."""
    row = picture.row
    texts = {name: _cut(row.get(name)) for name in ("id", "prompt", "negative_prompt")}
    names = ("row", "image_index", "seed", "nsfw", "truncated", "card", "path", MEMBER)
    # Seeds have up to 63 bits, and JavaScript's numbers 53.
    return {
        "src": picture.data,
        "bucket": picture.bucket,
        **texts,
        **{name: row.get(name) for name in names},
        "seed": str(row["seed"]),
    }


def _cut(text: Any) -> Any:
    return text if not isinstance(text, str) or len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."
