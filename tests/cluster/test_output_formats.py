"""Each format is opened by the libraries that people use, and keeps the promises: exactly once, the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from helpers import REPOSITORY, StoreServer, read_manifest, wait_for_commits, wait_until
from outside import Images, opened, run_outside
from PIL import Image

from benchmarks.chaos import card_processes
from gaudi_batch import InputError, JobConfig, RunResult, RunStopped, data_files, load_manifest, run
from gaudi_batch.cluster.connection import attached
from gaudi_batch.output.formats import SUFFIXES
from gaudi_batch.storage.store import Storage

pytestmark = pytest.mark.usefixtures("thread_cards")

WHOLE = ("webdataset", "parquet")
"""Formats that keep all images of a shard in one object."""
MORE = pytest.param("parquet", marks=pytest.mark.thorough)
Make = Callable[..., RunResult]


@pytest.fixture
def make(prompts: Path, tmp_path: Path, cluster: str) -> Make:
    """Runs a job of 100 rows in shards of 16; two that raise fail unless the run says otherwise."""

    def call(output_format: str, output: Path | str = tmp_path / "out", flags: Any = None, **fields: Any) -> RunResult:
        job = {
            "prompts": str(prompts),
            "output": str(output),
            "format": output_format,
            "device": "simulated",
            "simulated": {"batch_seconds": 0.01, "raise_rows": [5, 40]},
            "shard_size": 16,
            "cards": 1,
            "width": 64,
            "height": 64,
        }
        return run(JobConfig(**(job | fields)), address=cluster, **(flags or {}))

    return call


def objects(output: Path) -> dict[int, str]:
    """The SHA-256 of each shard's object."""
    paths = (output / "data").iterdir()
    return {int(path.name[:6]): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def members(path: str | Path) -> dict[str, bytes]:
    """The image files in an object, in order."""
    if str(path).endswith(".tar"):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member) for member in tar}
            return {name: file.read() for name, file in files.items() if file and not name.endswith(".json")}
    column = pq.read_table(path).column("image").to_pylist()
    return {image["path"]: image["bytes"] for image in column}


def images_in(paths: list[str]) -> list[str]:
    """The names of all images in some objects; each is a picture."""
    names = []
    for path in paths:
        for name, data in members(path).items():
            Image.open(io.BytesIO(data)).load()
            names.append(name)
    return names


def require_whole(output: Path, rows: int) -> None:
    """Objects hold exactly what the manifest names, in order, and lie beside nothing else."""
    manifest = [row for row in read_manifest(output) if row["status"] == "ok"]
    assert len({(row["row"], row["image_index"]) for row in manifest}) == len(manifest) == rows
    stored: dict[str, dict[str, bytes]] = {}
    for path in sorted((output / "data").iterdir()):
        stored[f"data/{path.name}"] = members(path)
        assert list(members(path)) == sorted(members(path))
    assert {(row["path"], row["member"]) for row in manifest} == {
        (path, name) for path, images in stored.items() for name in images
    }
    for row in manifest:
        assert hashlib.sha256(stored[row["path"]][row["member"]]).hexdigest() == row["sha256"]
    assert data_files(output) == [str(output / path) for path in sorted(stored)]
    assert not (output / "images").exists() or not list((output / "images").iterdir())


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def expected(output: Path) -> Images:
    """What a set must hold, from the manifest of a run of files."""
    images = []
    for row in read_manifest(output):
        if row["status"] == "ok":
            with Image.open(output / row["path"]) as image:
                digest = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
            images.append((row["row"], row["prompt"], digest))
    return sorted(images)


@pytest.mark.parametrize("output_format", WHOLE)
def test_a_shard_is_one_object_of_the_same_bytes_whoever_makes_it(
    make: Make, tmp_path: Path, output_format: str
) -> None:
    result = make(output_format, flags={"verify": True})
    assert result.summary["files"]["images"] == "data"
    require_whole(tmp_path / "out", 98)
    assert {path.suffix for path in (tmp_path / "out/data").iterdir()} == {f".{SUFFIXES[output_format]}"}
    make(output_format, tmp_path / "again", cards=3, batch_size=8)
    assert objects(tmp_path / "again") == objects(tmp_path / "out")
    make("files", tmp_path / "files")
    sums = [[row["sha256"] for row in read_manifest(tmp_path / name)] for name in ("out", "files")]
    assert sums[0] == sums[1]


@pytest.mark.parametrize("output_format", ["webdataset", MORE])
def test_rows_that_are_made_again_are_in_no_set_twice(make: Make, tmp_path: Path, output_format: str) -> None:
    output = tmp_path / "out"
    make(output_format)
    kept = objects(output)
    torn, gone = (next(output.glob(f"data/{shard:06d}-*")) for shard in (2, 4))
    data = torn.read_bytes()
    torn.write_bytes(data[:1000] + bytes(1000) + data[2000:])
    gone.unlink()
    with pytest.raises(RunStopped, match="missing: 1 object, torn: 1 object"):
        make(output_format, flags={"verify": True})
    fields = {"simulated": {"batch_seconds": 0.01, "raise_rows": [40]}}
    result = make(output_format, flags={"repair": True, "retry_failed": True, "verify": True}, **fields)
    assert result.summary["images"] == 99
    require_whole(output, 99)
    assert not torn.exists()
    assert {shard: digest for shard, digest in objects(output).items() if shard in kept} == {
        shard: digest for shard, digest in kept.items() if shard not in (2, 4)
    }


def test_a_set_that_is_opened_while_rows_are_made_again_has_none_of_them_twice(make: Make, tmp_path: Path) -> None:
    """The run stops when half of the rows of an object that was torn are made again."""
    output = tmp_path / "out"
    make("webdataset", max_failed=None)
    torn = next(output.glob("data/000002-*"))
    torn.write_bytes(torn.read_bytes()[:-600])
    fields = {"shard_size": 4, "max_failed": 3, "simulated": {"batch_seconds": 0.01, "raise_rows": [5, 40, 27, 28]}}
    with pytest.raises(RunStopped, match="max_failed"):
        make("webdataset", flags={"repair": True}, **fields)
    files = data_files(output)
    assert str(torn) not in files
    names = images_in(files)
    assert len(set(names)) == len(names)
    make("webdataset", flags={"retry_failed": True})
    require_whole(output, 98)


def test_another_format_is_another_job(make: Make) -> None:
    make("webdataset", limit=16)
    with pytest.raises(InputError, match=r"format: was 'webdataset', is 'parquet'"):
        make("parquet", limit=16)


DRIVER = """
import sys
from gaudi_batch import JobConfig, run
run(JobConfig.model_validate_json(sys.argv[1]), address=sys.argv[2])
"""


@pytest.mark.processes
@pytest.mark.parametrize("output_format", ["webdataset", pytest.param("files", marks=pytest.mark.thorough), MORE])
def test_a_driver_and_a_card_that_are_killed_change_no_byte(
    make: Make, prompts: Path, tmp_path: Path, cluster: str, output_format: str
) -> None:
    """A set that is opened when both are dead has committed images alone, each once."""
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "out"
    make(output_format, undisturbed, cards=2)
    job = JobConfig(
        prompts=str(prompts),
        output=str(output),
        format=output_format,
        device="simulated",
        simulated={"batch_seconds": 1.0, "raise_rows": [5, 40]},
        shard_size=16,
        cards=2,
        width=64,
        height=64,
    )
    with attached(cluster):
        session = ray._private.worker._global_node.get_session_dir_path()
        before = card_processes(session)
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, job.model_dump_json(), cluster])
        wait_for_commits(output, 1)
        killed = next(pid for pid in card_processes(session) if pid not in before)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: killed not in card_processes(session))
        wait_for_commits(output, 3)
        if output_format == "files":
            wait_until(lambda: pq.read_metadata(output / "images/metadata.parquet").num_rows)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        rows = load_manifest(output).to_table()
        committed = {row["sha256"] for row in rows.to_pylist() if row["status"] == "ok"}
        if output_format == "files":
            described = pq.read_table(output / "images/metadata.parquet")["file_name"].to_pylist()
            sums_of_set = [digest_of(output / "images" / name) for name in described]
            assert len(opened("imagefolder", str(output / "images"), tmp_path)["imagefolder"]) == len(described) > 0
        else:
            images = [data for path in data_files(output) for data in members(path).values()]
            sums_of_set = [hashlib.sha256(data).hexdigest() for data in images]
            assert len(sums_of_set) == len(committed)
        assert len(set(sums_of_set)) == len(sums_of_set)
        assert set(sums_of_set) <= committed
        wait_until(lambda: not set(card_processes(session)) - set(before))
        with contextlib.suppress(RunStopped):
            soon = job.simulated.model_copy(update={"batch_seconds": 0.01})
            assert run(job.model_copy(update={"simulated": soon})).exit_code == 3
    if output_format == "files":
        sums = [[row["sha256"] for row in read_manifest(place)] for place in (output, undisturbed)]
        assert sums[0] == sums[1]
        assert opened("imagefolder", str(output / "images"), tmp_path) == {"imagefolder": expected(output)}
        return
    require_whole(output, 98)
    assert objects(output) == objects(undisturbed)


def test_files_are_an_image_folder(make: Make, tmp_path: Path) -> None:
    """Also after a repair, whose torn image nobody finds."""
    output = tmp_path / "out"
    make("files", limit=32)
    torn = next(output.glob("images/*/00000009-00.png"))
    torn.write_bytes(torn.read_bytes()[:-9])
    make("files", limit=32, flags={"repair": True})
    assert not torn.exists()
    assert opened("imagefolder", str(output / "images"), tmp_path) == {"imagefolder": expected(output)}


def test_objects_are_opened_from_disk_and_from_s3(make: Make, tmp_path: Path, s3: StoreServer) -> None:
    make("files", tmp_path / "files", limit=32)
    images = expected(tmp_path / "files")
    for output_format, ways in (("webdataset", "webdataset,wds"), ("parquet", "parquet,duckdb,pandas,polars")):
        make(output_format, tmp_path / output_format, limit=32)
        place = f"{tmp_path}/{output_format}/data/*.{SUFFIXES[output_format]}"
        assert opened(ways, place, tmp_path) == dict.fromkeys(ways.split(","), images)
        url = s3.url(f"{tmp_path.name}-{output_format}")
        make(output_format, url, limit=32, storage_options=s3.options)
        assert len(data_files(url, s3.options)) == 3
        place = f"{url}/data/*.{SUFFIXES[output_format]}"
        assert opened(ways, place, tmp_path / "s3", s3.options) == dict.fromkeys(ways.split(","), images)
        assert Storage(url, s3.options).names("images") == []


SQL = """
import fsspec, json, sys, duckdb
options = json.loads(sys.argv[2])
duckdb.register_filesystem(fsspec.filesystem("s3", **options))
print(json.dumps(duckdb.sql(sys.argv[1]).fetchall()))
"""


def test_the_documented_query_counts_failed_rows_by_reason_in_s3(make: Make, tmp_path: Path, s3: StoreServer) -> None:
    url = s3.url(f"{tmp_path.name}-sql")
    make("files", url, storage_options=s3.options)
    now = {"simulated": {"batch_seconds": 0.01, "raise_rows": [40]}}
    make("files", url, storage_options=s3.options, flags={"retry_failed": True}, **now)
    for page in ("docs/datasets.md", "README.md"):
        query = (REPOSITORY / page).read_text().partition("```sql\n")[2].partition("```")[0]
        assert "s3://bucket/runs/first/manifest/" in query
        query = query.replace("s3://bucket/runs/first", url)
        printed = run_outside("-c", SQL, query.rstrip(";\n"), json.dumps(s3.options), home=tmp_path / "home")
        failed = json.loads(printed.strip().splitlines()[-1])
        assert failed == [["RuntimeError: simulated failure of row 40", 1, "40"]], page
