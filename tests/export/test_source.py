"""Images of a run are read about once, however the rows of its objects lie among each other."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gaudi_batch.errors import StorageError
from gaudi_batch.export import parts
from gaudi_batch.export.parts import PartTask, Spans, located, write_tasks
from gaudi_batch.export.plan import cut, parts_of
from gaudi_batch.export.source import ImageAt, read_images
from gaudi_batch.output.formats import SUFFIXES, WRITERS
from gaudi_batch.storage.store import Storage

FORMATS = ["webdataset", "parquet"]
ROWS = 240


class Counting(Storage):
    """A place that knows which bytes of each object were read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.read: Counter[str] = Counter()

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        self.read[path] += stop - start
        return super().get_range(path, start, stop)


def image_of(row: int) -> bytes:
    return random.Random(row).randbytes(2000 + row % 500)


def name_of(row: int) -> str:
    return f"{row:08d}-00.png"


def described(rows: list[int]) -> pa.Table:
    return pa.table({"row": rows, "prompt": [f"prompt {row}" for row in rows]})


def run_of(place: Path, output_format: str, objects: list[list[int]]) -> tuple[Counting, dict[int, ImageAt]]:
    """A run with objects of these rows; where the image of each row is."""
    at: dict[int, ImageAt] = {}
    (place / "data").mkdir(parents=True)
    for shard, rows in enumerate(objects):
        path = f"data/{shard:06d}-aaaaaa.{SUFFIXES[output_format]}"
        names, images = [name_of(row) for row in rows], [image_of(row) for row in rows]
        with (place / path).open("wb") as file:
            WRITERS[output_format](file, described(rows), names, images)
        for row, name, image in zip(rows, names, images, strict=True):
            at[row] = ImageAt(path, name, hashlib.sha256(image).hexdigest())
    return Counting(str(place)), at


def tasks_of(at: dict[int, ImageAt], splits: list[str]) -> list[PartTask]:
    """The parts of all rows, those of a split together, in some objects a split."""
    rows = sorted(at, key=lambda row: (splits[row], row))
    tasks = []
    cuts = cut(sorted(splits), [len(image_of(row)) for row in rows], "parquet", 100_000)
    for part in parts_of(cuts, "parquet"):
        of_part = rows[part.start : part.stop]
        names = [name_of(row) for row in of_part]
        tasks.append(PartTask(part, described(of_part), [at[row] for row in of_part], names, "parquet"))
    assert len(tasks) > 3
    return tasks


def exported(source: Storage, target: Path, at: dict[int, ImageAt], splits: list[str]) -> Spans:
    """Exports all rows; where the images of scattered objects lie."""
    tasks, spans = tasks_of(at, splits), dict[str, Any]()
    assert list(write_tasks(source, Storage(str(target)), tasks, None, spans))
    rows = [row for task in tasks for row in task.described["row"].to_pylist()]
    stored = [row for task in tasks for row in pq.read_table(target / task.part.path).to_pylist()]
    assert [row["row"] for row in stored] == rows
    assert [row["image"] for row in stored] == [{"bytes": image_of(row), "path": name_of(row)} for row in rows]
    return spans


def objects_of(kind: str) -> tuple[list[list[int]], list[str]]:
    """The rows of each object, and the split of each row."""
    every, one_split = list(range(ROWS)), ["train"] * ROWS
    if kind == "interleaved":
        return [every[half : half + 80 : 2] for start in range(0, ROWS, 80) for half in (start, start + 1)], one_split
    if kind == "made again":
        again = every[7::20]
        kept = [row for row in every if row not in again]
        return [kept[:100], kept[100:], again], one_split
    return [every[start : start + 60] for start in range(0, ROWS, 60)], [f"s{row % 6}" for row in every]


@pytest.mark.parametrize("kind", ["interleaved", "made again", "splits"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_no_object_is_read_more_than_twice(tmp_path: Path, output_format: str, kind: str) -> None:
    objects, splits = objects_of(kind)
    source, at = run_of(tmp_path / "run", output_format, objects)
    spans = exported(source, tmp_path / "out", at, splits)
    for path, size in source.read.items():
        assert size <= 2 * (tmp_path / "run" / path).stat().st_size, f"{path} was read more than twice"
    source.read.clear()
    some = [at[row] for row in range(0, ROWS, 16) if at[row].path in spans]
    assert None not in list(read_images(source, located(some, spans)))
    assert 0 < sum(source.read.values()) < 2500 * ROWS / 16, "pictures of the card are read alone"


def test_parts_are_written_as_soon_as_their_own_images_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = range(0, 480, 40)
    source, at = run_of(
        tmp_path / "run", "webdataset", [[*range(start + k, start + 40, 2)] for start in starts for k in (0, 1)]
    )
    tasks, target = tasks_of(at, ["train"] * 480), Storage(str(tmp_path / "out"))
    steps: list[str] = []

    def one_by_one(function: Any, storages: Sequence[Storage], items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for item in items:
            steps.append(item.part.path if isinstance(item, PartTask) else item)
            yield item, function(*storages, item)

    monkeypatch.setattr(parts, "workers", lambda _: contextlib.nullcontext(one_by_one))
    paths = {task.part.path: {image.path for image in task.images if image is not None} for task in tasks}
    writing = write_tasks(source, target, tasks, None, {})
    assert next(writing).path == tasks[0].part.path
    assert len(steps) <= 12 < len(tasks)
    assert [*writing][-1].path == tasks[-1].part.path
    assert len(steps) == len(set(steps)) == len(tasks) + len(set().union(*paths.values())), "each is read once"
    for path, objects in paths.items():
        assert objects <= set(steps[: steps.index(path)])
    # Of an export that was killed, objects whose parts are all there are not read again.
    steps.clear()
    assert len(list(write_tasks(source, target, tasks[12:], None, {}))) == len(tasks) - 12
    assert set(steps) - set(paths) <= set().union(*(paths[task.part.path] for task in tasks[12:]))


@pytest.mark.parametrize("output_format", FORMATS)
def test_objects_in_the_order_of_rows_are_read_in_few_requests(tmp_path: Path, output_format: str) -> None:
    source, at = run_of(tmp_path / "run", output_format, [list(range(start, start + 60)) for start in (0, 60)])
    assert list(read_images(source, list(at.values()))) == [image_of(row) for row in at]
    assert source.read == {path: (tmp_path / "run" / path).stat().st_size for path in source.read}


@pytest.mark.parametrize("torn", [0, 700, -20_000])
@pytest.mark.parametrize("output_format", FORMATS)
def test_a_torn_object_is_told_however_its_images_are_read(tmp_path: Path, output_format: str, torn: int) -> None:
    objects, splits = objects_of("interleaved")
    source, at = run_of(tmp_path / "run", output_format, objects)
    path = tmp_path / "run" / at[2].path
    path.write_bytes(path.read_bytes()[:torn])
    with pytest.raises(StorageError, match=r"000000-aaaaaa.*; the run's command with --repair makes it again"):
        exported(source, tmp_path / "out", at, splits)


def test_a_byte_that_changed_is_told(tmp_path: Path) -> None:
    objects, splits = objects_of("interleaved")
    source, at = run_of(tmp_path / "run", "webdataset", objects)
    path = tmp_path / "run" / at[2].path
    data: Any = bytearray(path.read_bytes())
    data[data.index(image_of(2)) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"00000002-00\.png is not what its manifest says"):
        exported(source, tmp_path / "out", at, splits)
