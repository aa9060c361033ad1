"""How an export is packed: which rows become which object."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.errors import InputError
from gaudi_batch.export.selection import REST
from gaudi_batch.export.source import OVERHEAD
from gaudi_batch.layout import DATA
from gaudi_batch.output.formats import SUFFIXES
from gaudi_batch.output.manifest import FILES

FOLDER_FILES = 5_000
"""Files of a folder of format `files`."""
HUB_FOLDER_FILES = 10_000
"""Files that Hugging Face's hub takes in a folder."""
HUB_FILES = 100_000
"""Files that Hugging Face's hub takes in a repository."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """Images that are written together: an object, or a folder of files."""

    path: str
    """Of the object or the folder, in the destination."""
    split: str
    start: int
    """The first of its rows, of the export's rows in order."""
    stop: int


Cuts = Mapping[str, Sequence[int]]
"""Of each split, in order, the row after the last of each part."""


def parse_size(text: str) -> int:
    """Bytes, from a text such as 500MB or 1.5GiB. Raises InputError."""
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if size < 1:
        raise InputError(f"--target-size {text!r}: must be a size such as 500MB or 1GiB")
    return size


def in_order(rows: pa.Table, splits: Sequence[str]) -> tuple[pa.Table, list[str]]:
    """Rows and their splits in order of split, row and image; first what no share has taken."""
    keys = pa.array(["" if split == REST else split for split in splits], pa.string())
    keyed = rows.select(["row", "image_index"]).append_column("split", keys)
    order = pc.sort_indices(keyed, [("split", "ascending"), ("row", "ascending"), ("image_index", "ascending")])
    return rows.take(order), [splits[place] for place in order.to_pylist()]


def cut(splits: Sequence[str], sizes: Sequence[int], output_format: str, target_size: int) -> Cuts:
    """Packs images, each split by itself.

    Args:
        splits: of each image, in order.
        sizes: bytes of each.
        output_format: of the export.
        target_size: bytes of an object, about; an image that is larger is one by itself. Of files a folder has
            FOLDER_FILES at most.
    """
    cuts: dict[str, list[int]] = {}
    for split in dict.fromkeys(splits):
        start = splits.index(split)
        rows = range(start, start + splits.count(split))
        cuts[split] = list(_ends(sizes, rows, output_format, target_size))
    return cuts


def parts_of(cuts: Cuts, output_format: str) -> list[Part]:
    """The parts of an export."""
    parts: list[Part] = []
    first = 0
    for split, ends in cuts.items():
        for number, end in enumerate(ends):
            if output_format == FILES:
                path = f"{split}/{number:05d}"
            else:
                path = f"{DATA}/{split}-{number:05d}-of-{len(ends):05d}.{SUFFIXES[output_format]}"
            parts.append(Part(path, split, first, end))
            first = end
    return parts


def _ends(sizes: Sequence[int], rows: range, output_format: str, target_size: int) -> Iterator[int]:
    first, size = rows.start, 0
    for row in rows:
        more = sizes[row] + OVERHEAD
        is_full = row - first >= FOLDER_FILES if output_format == FILES else size + more > target_size
        if is_full and row > first:
            yield row
            first, size = row, 0
        size += more
    if rows:
        yield rows.stop
