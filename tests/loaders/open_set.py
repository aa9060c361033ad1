"""Opens a set of images by libraries that people use, and prints what it holds; the environment is of `make loaders`.

    python open_set.py WAY PLACE [STORAGE_OPTIONS]

Prints a JSON object for each image: its row, its prompt, the SHA-256 of its pixels, or of its file where the library
decodes none, and the seconds that it took to load all.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Image = tuple[int, str, str]


def pixels(image: Any) -> str:
    """The SHA-256 of a picture's pixels."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def decoded(data: bytes) -> str:
    """The same of a file."""
    from PIL import Image as Pictures

    return pixels(Pictures.open(io.BytesIO(data)))


def loaded(kind: str, place: str, options: dict[str, Any], **where: str) -> Iterator[Image]:
    """By `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    splits = datasets.load_dataset(kind, **where, storage_options=options or None)
    for split in splits.values():
        for sample in split:
            record = sample.get("json", sample)
            image = sample["image"] if "image" in sample else sample["png"]
            yield record["row"], record["prompt"], pixels(image)


def names(pattern: str, options: dict[str, Any]) -> list[str]:
    """The files of a pattern."""
    if "://" not in pattern:
        return sorted(map(str, Path(pattern).parent.glob(Path(pattern).name)))
    import fsspec

    filesystem = fsspec.filesystem("s3", **options)
    return [f"s3://{name}" for name in sorted(filesystem.glob(pattern.removeprefix("s3://")))]


def imagefolder(place: str, options: dict[str, Any]) -> Iterator[Image]:
    """A directory with a metadata.parquet."""
    return loaded("imagefolder", place, options, data_dir=place)


def parquet(place: str, options: dict[str, Any]) -> Iterator[Image]:
    """Parquet files, by a pattern."""
    return loaded("parquet", place, options, data_files=place)


def webdataset(place: str, options: dict[str, Any]) -> Iterator[Image]:
    """Tar files, by a pattern."""
    return loaded("webdataset", place, options, data_files=place)


def wds(place: str, options: dict[str, Any]) -> Iterator[Image]:
    """The same, by the library of that name."""
    import fsspec
    import webdataset

    webdataset.gopen_schemes["s3"] = lambda url, *_, **__: fsspec.open(url, "rb", **options).open()
    for sample in webdataset.WebDataset(names(place, options), shardshuffle=False).decode("pil"):
        assert sample["__key__"] == f"{sample['json']['row']:08d}-{sample['json']['image_index']:02d}"
        yield sample["json"]["row"], sample["json"]["prompt"], pixels(sample["png"])


def duckdb(place: str, options: dict[str, Any]) -> Iterator[Image]:
    """Parquet files, by a pattern."""
    import duckdb

    if options:
        import fsspec

        duckdb.register_filesystem(fsspec.filesystem("s3", **options))
    query = f"select row, prompt, image.bytes from read_parquet('{place}') order by row, image_index"
    for row, prompt, data in duckdb.sql(query).fetchall():
        yield row, prompt, decoded(data)


def pandas(place: str, options: dict[str, Any]) -> Iterator[Image]:
    """Parquet files, by a pattern."""
    import pandas

    for name in names(place, options):
        for record in pandas.read_parquet(name, storage_options=options or None).to_dict("records"):
            yield record["row"], record["prompt"], decoded(record["image"]["bytes"])


def polars(place: str, options: dict[str, Any]) -> Iterator[Image]:
    """Parquet files, by a pattern."""
    import polars

    of_s3 = {}
    if options:
        of_s3 = {
            "aws_access_key_id": options["key"],
            "aws_secret_access_key": options["secret"],
            "aws_endpoint_url": options["client_kwargs"]["endpoint_url"],
            "aws_region": options["client_kwargs"]["region_name"],
            "aws_allow_http": "true",
        }
    for record in polars.read_parquet(place, storage_options=of_s3 or None).iter_rows(named=True):
        yield record["row"], record["prompt"], decoded(record["image"]["bytes"])


if __name__ == "__main__":
    ways, place = sys.argv[1].split(","), sys.argv[2]
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    for way in ways:
        started = time.perf_counter()
        images = list(globals()[way](place, copy.deepcopy(options)))  # some change what they are given
        seconds = round(time.perf_counter() - started, 2)
        print(json.dumps({"way": way, "seconds": seconds, "images": images}))
