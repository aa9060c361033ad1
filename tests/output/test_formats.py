"""Objects that hold all images of a shard: their content, their bytes, and what a disk that is full makes of them."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY, Unfenced
from outside import opened
from PIL import Image
from records import BUCKET

from gaudi_batch.config.sections import EncodingConfig
from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.layout import data_path
from gaudi_batch.output import manifest
from gaudi_batch.output.cleanup import remove_superseded
from gaudi_batch.output.formats import SUFFIXES, WRITERS, parquet, whole
from gaudi_batch.output.formats.base import Attempt
from gaudi_batch.output.formats.image_folder import ImageFolder
from gaudi_batch.output.formats.whole import WholeOutput
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo, ImageInfo, StoredImage
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.output.verify import verify
from gaudi_batch.storage.store import Storage

FORMATS = ["webdataset", "parquet"]


def picture(row: int, side: int = 16) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(row).integers(0, 255, (side, side, 3), np.uint8)


def store(storage: Storage, output_format: str, rows: list[int], shard: int = 0, **fields: Any) -> bytes:
    """Stores a shard as a card does, its images in any order and those of row 99 dropped; returns its manifest."""
    attempt = Attempt(shard, f"aaaaa{shard}")
    suffix, write = SUFFIXES[output_format], WRITERS[output_format]
    output = WholeOutput(storage, EncodingConfig(), attempt, suffix, write)
    stored: dict[int, StoredImage] = {}
    for row in [*reversed(rows), 99]:
        stored[row] = output.add(row, 0, picture(row))
    output.drop(stored.pop(99))
    prompts = [PromptRow(row, f"id {row}", f"prompt {row} ü", "", None, BUCKET, 1, None) for row in [*rows, 99]]
    images = {(row, 0): ImageInfo(stored[row], row, None, False) for row in rows}
    info = CommitInfo(shard, attempt.token, "card", "node", None, len(rows) + 1, 1, len(rows), ThroughputTotals())
    info = CommitInfo(**{**vars_of(info), "format": output_format, **fields})
    carried = pa.table({"topic": [f"t{row}" for row in rows] + [None]})
    table = manifest.tabulate(prompts, carried, images, {99: "boom"}, 0, info)
    digest = output.finish(table)
    output.close()
    return manifest.encode(table, CommitInfo(**{**vars_of(info), "object_sha256": digest}))


def vars_of(info: CommitInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__dataclass_fields__}


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None, "not a file"
    return file.read()


def content(storage: Storage, output_format: str) -> list[tuple[str, dict[str, Any], bytes]]:
    """The name of each image in an object, its row and its file."""
    data = storage.get(data_path(0, "aaaaa0", SUFFIXES[output_format])) or b""
    if output_format == "parquet":
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        return [(row["image"]["path"], row, row.pop("image")["bytes"]) for row in rows]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {name: read_member(tar, name) for name in tar.getnames()}
    names = [name for name in members if name.endswith(".png")]
    assert list(members) == [name for image in names for name in (image, image.replace(".png", ".json"))]
    return [(name, json.loads(members[name.replace(".png", ".json")]), members[name]) for name in names]


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_object_has_the_images_of_its_shard_in_order_and_what_they_show(tmp_path: Path, output_format: str) -> None:
    storage = Storage(str(tmp_path))
    table, info = manifest.read(store(storage, output_format, [3, 4, 7]))
    images = content(storage, output_format)
    assert [name for name, _, _ in images] == ["00000003-00.png", "00000004-00.png", "00000007-00.png"]
    for (name, row, data), number in zip(images, [3, 4, 7], strict=True):
        assert (row["row"], row["prompt"], row["topic"]) == (number, f"prompt {number} ü", f"t{number}")
        assert not row.keys() & {"path", "card", "shard", "finished_at", "status", "member"}
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture(number)), name
    named = table.filter(pa.compute.is_valid(table["path"])).select(["member", "sha256"]).to_pylist()
    assert named == [{"member": name, "sha256": hashlib.sha256(data).hexdigest()} for name, _, data in images]
    assert storage.sha256(data_path(0, "aaaaa0", SUFFIXES[output_format])) == info.object_sha256


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_object_has_the_same_bytes_however_its_images_came(
    tmp_path: Path, output_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they do not fit into memory."""
    digests = []
    for name, spool in (("a", 1 << 20), ("b", 100)):
        monkeypatch.setattr(whole, "SPOOL_BYTES", spool)
        digests.append(manifest.read(store(Storage(str(tmp_path / name)), output_format, [3, 4, 7]))[1].object_sha256)
    assert digests[0] == digests[1] != ""


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_shard_without_images_has_no_object(tmp_path: Path, output_format: str) -> None:
    storage = Storage(str(tmp_path))
    table, info = manifest.read(store(storage, output_format, []))
    assert (table["status"].to_pylist(), info.object_sha256) == (["failed"], "")
    assert storage.names("data") == []


def test_an_attempt_that_has_ended_takes_no_more_images(tmp_path: Path) -> None:
    output = WholeOutput(Storage(str(tmp_path)), EncodingConfig(), Attempt(0, "a"), "tar", WRITERS["webdataset"])
    output.close()
    with pytest.raises(ValueError, match="has ended"):
        output.add(0, 0, picture(0))


@pytest.mark.parametrize(("sizes", "groups"), [([10] * 250, [100, 100, 50]), ([400, 400, 400, 2000, 1], [2, 1, 1, 1])])
def test_a_row_group_is_small_enough_to_read_one_image_of_it(
    sizes: list[int], groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 1000)
    buffer = io.BytesIO()
    described = pa.table({"row": list(range(len(sizes)))})
    names = [f"{row}.png" for row in range(len(sizes))]
    monkeypatch.setattr(parquet, "ROW_GROUP_ROWS", 100)
    parquet.write_parquet(buffer, described, names, (bytes(size) for size in sizes))
    file = pq.ParquetFile(buffer)
    # Sizes of 10 bytes are bound by rows alone.
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == groups
    assert json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"] == {"image": {"_type": "Image"}}


LATIN = pa.array([b"\xe9", b"x"]).view(pa.string())
ODD = {
    "image": pa.array(["a", None]),
    "dictionary": pa.array(["x", "y"]).dictionary_encode(),
    "time": pa.array([datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), None], pa.timestamp("us", "UTC")),
    "day": pa.array([datetime.date(2026, 1, 2), None]),
    "took": pa.array([datetime.timedelta(seconds=90), None]),
    "price": pa.array([decimal.Decimal("1.50"), None]),
    "raw": pa.array([b"\x00\xff", None]),
    "number": pa.array([float("nan"), 1.5]),
    "nested": pa.array([{"a": [1, None]}, None]),
    "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    "latin": pa.array([b"caf\xe9", b"x"]).view(pa.string()),
    "author": pa.StructArray.from_arrays(
        [pa.array([b"\xe9", b"x"]).view(pa.string()), pa.array([1, 2])], ["name", "n"]
    ),
    "names": pa.ListArray.from_arrays([0, 2, 2], LATIN),
    "times": pa.array([[("k", 2**62 + 1)], None], pa.map_(pa.string(), pa.int64())).cast(
        pa.map_(pa.string(), pa.timestamp("ns"))
    ),
}
"""Columns that a job may carry."""


@pytest.mark.parametrize("output_format", FORMATS)
def test_columns_of_any_type_are_in_an_object(output_format: str) -> None:
    buffer = io.BytesIO()
    WRITERS[output_format](buffer, pa.table(ODD), ["a.png", "b.png"], [b"1", b"2"])
    buffer.seek(0)
    if output_format == "parquet":
        rows = pq.read_table(buffer).drop_columns("times").to_pylist()
        assert [row["image"]["path"] for row in rows] == ["a.png", "b.png"]
        assert (rows[0]["input_image"], rows[0]["dictionary"], rows[0]["raw"]) == ("a", "x", b"\x00\xff")
        assert (rows[0]["map"], rows[0]["latin"]) == ([{"key": "k", "value": 1}], "caf\ufffd")
        assert (rows[0]["author"], rows[0]["names"]) == ({"name": "\ufffd", "n": 1}, ["\ufffd", "x"])
        times = pq.read_table(buffer)["times"].combine_chunks().flatten().field("value")
        assert times.cast(pa.int64()).to_pylist() == [2**62 + 1], "no nanosecond is lost"
        return
    with tarfile.open(fileobj=buffer) as tar:
        first, second = (json.loads(read_member(tar, name)) for name in ("a.json", "b.json"))
    assert "2116-02-20" in str(first.pop("times"))
    assert first == {
        "image": "a",
        "dictionary": "x",
        "time": "2026-01-02T00:00:00+00:00",
        "day": "2026-01-02",
        "took": 90.0,
        "price": "1.50",
        "raw": "AP8=",
        "number": None,
        "nested": {"a": [1, None]},
        "map": [{"key": "k", "value": 1}],
        "latin": "caf\ufffd",
        "author": {"name": "\ufffd", "n": 1},
        "names": ["\ufffd", "x"],
    }
    assert (second["image"], second["dictionary"], second["number"]) == ("", "y", 1.5), "a null text is empty"


def test_a_loader_of_image_folders_takes_no_carried_column_for_its_own(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path / "metadata.parquet")
    columns = {
        "file_name": ["x"],
        "image": ["y"],
        "mask_file_name": ["z"],
        "mask_file_name_text": ["u"],
        "file_names": [["v"]],
    }
    folder.add(pa.chunked_array([["a.png"]]), pa.table(columns))
    assert folder.close()
    (row,) = pq.read_table(tmp_path / "metadata.parquet").to_pylist()
    assert row == {
        "file_name": "a.png",
        "input_file_name_text": "x",
        "input_image": "y",
        "mask_file_name_text_": "z",
        "mask_file_name_text": "u",
        "file_names_text": ["v"],
    }


COCO_FIELDS = {"file_name": pa.string(), "file_name_text": pa.string(), "file_names": pa.list_(pa.string())}
OF_COCO = pa.struct(list(COCO_FIELDS.items()))
COCO = {"file_name": "coco0.jpg", "file_name_text": "t", "file_names": ["coco1.jpg"]}
CALLED_SO = {"file_name_text_": "coco0.jpg", "file_name_text": "t", "file_names_text": ["coco1.jpg"]}
NESTED = {
    "meta": pa.array([None, COCO], OF_COCO),
    "file_names": pa.array([["b.jpg"], None], pa.large_list(pa.large_string())),
    "deep": pa.array([None, {"seen": [{"mask_file_name": "m"}, None]}]),
    "large": pa.array([[COCO], []], pa.large_list(OF_COCO)),
    "pair": pa.array([[COCO, None], None], pa.list_(OF_COCO, 2)),
    "map": pa.array([[("k", COCO)], None], pa.map_(pa.string(), OF_COCO)),
}
"""Columns whose fields have names that loaders of image folders take for files."""


def test_a_loader_of_image_folders_takes_no_nested_field_for_a_file(tmp_path: Path) -> None:
    described = pa.table({"row": [0, 1], "prompt": ["p", "q"], **NESTED})
    folder = ImageFolder(tmp_path / "set/metadata.parquet")
    (tmp_path / "set/1").mkdir(parents=True)
    for row in range(2):
        Image.fromarray(picture(row)).save(tmp_path / f"set/1/{row}.png")
        folder.add(pa.chunked_array([[f"1/{row}.png"]]), described.slice(row, 1))
    assert folder.close()
    first, second = pq.read_table(tmp_path / "set/metadata.parquet").to_pylist()
    assert (first["meta"], second["meta"]) == (None, CALLED_SO)
    assert (first["file_names_text"], second["file_names_text"]) == (["b.jpg"], None)
    assert second["deep"] == {"seen": [{"mask_file_name_text": "m"}, None]}
    assert (first["large"], first["pair"]) == ([CALLED_SO], [CALLED_SO, None])
    assert first["map"] == [{"key": "k", "value": CALLED_SO}]
    images = [(row, "pq"[row], hashlib.sha256(picture(row).tobytes()).hexdigest()) for row in range(2)]
    assert opened("imagefolder", str(tmp_path / "set"), tmp_path) == {"imagefolder": images}


@pytest.mark.parametrize("harm", ["torn", "missing"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_of_an_object_that_is_torn_or_missing_all_rows_are_broken(
    tmp_path: Path, output_format: str, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in parts."""
    monkeypatch.setattr("gaudi_batch.storage.reading.PART_BYTES", 100)
    ledger = Ledger(Storage(str(tmp_path)), Unfenced())
    for shard, rows in enumerate([[1, 2], [3, 4]]):
        data = store(ledger.storage, output_format, rows, shard)
        assert ledger.commit(manifest.read(data)[1], data)
    assert verify(ledger, [0, 1], {}).broken == {}
    path = data_path(1, "aaaaa1", SUFFIXES[output_format])
    if harm == "torn":
        whole_object = ledger.storage.get(path) or b""
        ledger.storage.put(path, whole_object[:-1] + b"x")
    else:
        ledger.storage.remove(path)
    report = verify(ledger, [0, 1], {})
    assert (getattr(report, harm), report.broken, report.images) == ([path], {3: 1, 4: 1}, 4)


def test_an_object_goes_when_all_of_its_rows_are_made_again(tmp_path: Path) -> None:
    ledger = Ledger(Storage(str(tmp_path)), Unfenced())
    for shard, rows in enumerate([[1, 2], [3, 4], [1], [2]]):
        data = store(ledger.storage, "webdataset", rows, shard, again=shard > 1)
        assert ledger.commit(manifest.read(data)[1], data)
    remove_superseded(ledger, {1: 2}, range(3))
    assert [name[:6] for name in ledger.storage.names("data")] == ["000000", "000001", "000002", "000003"]
    remove_superseded(ledger, {1: 2, 2: 3}, range(4))
    assert [name[:6] for name in ledger.storage.names("data")] == ["000001", "000002", "000003"]


FULL = """
import numpy as np
from gaudi_batch.config.sections import EncodingConfig
from gaudi_batch.errors import StorageError
from gaudi_batch.output.formats import WRITERS, whole
from gaudi_batch.output.formats.base import Attempt
from gaudi_batch.storage.store import Storage
whole.SPOOL_BYTES = 1000
output = whole.WholeOutput(Storage("out"), EncodingConfig(), Attempt(0, "a"), "tar", WRITERS["webdataset"])
try:
    output.add(0, 0, np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8))
except StorageError as error:
    print(error)
"""


def test_a_temporary_directory_that_is_full_is_no_row_s_fault(tmp_path: Path) -> None:
    """As with any storage that fails, the node is to blame."""
    (tmp_path / "small").mkdir()
    script = 'mount -t tmpfs -o size=64k none small && exec "$@"'
    result = subprocess.run(
        [
            "unshare",
            "--mount",
            *(["--map-root-user"] if os.getuid() else []),
            "sh",
            "-c",
            script,
            "sh",
            sys.executable,
            "-c",
            FULL,
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path / "small"), "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    told = f"can't keep images until their shard is whole in {tmp_path}/small: No space left on device"
    assert told in result.stdout, result.stderr
