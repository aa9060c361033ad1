"""A run goes on with the same prompts wherever they lie, and takes more rows without making one again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import StoreServer, Unfenced, called, read_manifest

from gaudi_batch import InputError, JobConfig, RunResult, run
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.driver.growth import differences
from gaudi_batch.driver.opening import begin_run
from gaudi_batch.job import resolve
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.pipelines.sources import builtin_directory
from gaudi_batch.storage.store import Storage

pytestmark = pytest.mark.usefixtures("thread_cards")

FIELDS: dict[str, Any] = {"device": "simulated", "shard_size": 8, "batch_size": 4, "cards": 1}
SIMULATED: dict[str, Any] = {"batch_seconds": 0.0}


def job(prompts: Path | str, output: Path | str, **fields: Any) -> JobConfig:
    return JobConfig(prompts=str(prompts), output=str(output), **(FIELDS | {"simulated": SIMULATED} | fields))


def make(prompts: Path | str, output: Path | str, address: str, *flags: str, **fields: Any) -> RunResult:
    return run(job(prompts, output, **fields), address=address, **dict.fromkeys(flags, True))


def command(prompts: Path, output: Path, address: str, *flags: str) -> subprocess.CompletedProcess[str]:
    usual = ("--device", "simulated", "--shard-size", "8", "--batch-size", "4", "--cards", "1")
    where = ("--prompts", prompts, "--output", output, "--address", address)
    return called("run", *where, *usual, "--simulated.batch-seconds", "0", *flags)


def images(output: Path) -> dict[tuple[int, int], str]:
    """What the manifest says of each image; a file of that content is there."""
    rows = [row for row in read_manifest(output) if row["status"] == "ok"]
    assert all((output / row["path"]).exists() for row in rows)
    hashes = {(row["row"], row["image_index"]): row["sha256"] for row in rows}
    assert len(hashes) == len(rows), "an image is there twice"
    return hashes


def paths(output: Path) -> dict[int, str]:
    return {row["row"]: row["path"] for row in read_manifest(output)}


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture
def shaped(write_prompts: Callable[..., Path]) -> Path:
    """Two files of 20 rows in two buckets, some rows with two images, one that can't be run."""
    tables = [
        {
            "prompt": [None if row == 3 else f"prompt {row}" for row in range(first, first + 20)],
            "width": [64 if row % 3 else 128 for row in range(first, first + 20)],
            "num_images": [1 + (row % 7 == 0) for row in range(first, first + 20)],
        }
        for first in (0, 20)
    ]
    return write_prompts(*tables, row_group_size=6)


def test_a_trial_is_not_paid_for_twice(shaped: Path, tmp_path: Path, cluster: str) -> None:
    output, at_once = tmp_path / "out", tmp_path / "at-once"
    assert command(shaped, output, cluster, "--limit", "9").returncode == 3
    tried = paths(output)
    assert sorted(tried) == list(range(9))
    grown = command(shaped, output, cluster)
    assert grown.returncode == 3, grown.stderr
    assert "the run has 9 rows and gets 31 more" in grown.stderr
    assert command(shaped, at_once, cluster).returncode == 3
    assert images(output) == images(at_once)
    assert {row: path for row, path in paths(output).items() if row < 9} == tried
    record, summary = load(output / "run.json"), load(output / "summary.json")
    assert [(each["rows"], each["images"], each["files"]) for each in record["grown"]] == [(9, 11, [])]
    assert (record["rows"], record["images"]) == (40, load(at_once / "run.json")["images"])
    assert summary["state"] == "complete with failed rows"
    for name in ("rows", "rows_planned", "images", "images_planned", "failed_rows"):
        assert summary[name] == load(at_once / "summary.json")[name], name
    status = called("status", output, "--json")
    assert (status.returncode, json.loads(status.stdout)["rows"]) == (0, 40)


def test_files_are_added_to_a_run_that_is_half_done_and_has_rows_that_were_made_again(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    fails = {"simulated": SIMULATED | {"raise_rows": [5]}}
    assert make(prompts, output, cluster, limit=50, **fails).exit_code == 3
    assert make(prompts, output, cluster, "retry_failed", limit=50).exit_code == 0
    made = paths(output)
    lost = output / "manifest" / "000001.parquet"
    of_lost = set(pq.read_table(lost).column("row").to_pylist())
    lost.unlink()
    pq.write_table(pa.table({"prompt": ["corrected", "more"], "topic": ["t0", "t1"]}), prompts / "part-3.parquet")
    assert make(prompts, output, cluster).exit_code == 0
    assert images(output) == images(Path(make(prompts, tmp_path / "at-once", cluster).output))
    assert {row: path for row, path in paths(output).items() if row in made.keys() - of_lost} == {
        row: path for row, path in made.items() if row not in of_lost
    }
    again = tmp_path / "again"
    (prompts / "part-4.parquet").write_bytes((prompts / "part-3.parquet").read_bytes())
    assert make(prompts, output, cluster, limit=103).exit_code == 0
    assert images(output) == images(Path(make(prompts, again, cluster, limit=103).output))
    record = load(output / "run.json")
    files = [each["files"] for each in record["grown"]]
    assert (files, record["rows"]) == ([["part-3.parquet"], ["part-4.parquet"]], 103)


def test_a_driver_that_is_killed_while_a_run_grows_leaves_it_as_it_was(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    """Between the plan and run.json."""
    output = tmp_path / "out"
    make(prompts, output, cluster, limit=10)
    before = (output / "run.json").read_bytes()
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, job(prompts, output).model_dump_json(), cluster],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (output / "run.json").read_bytes() == before
    assert len(pq.read_table(output / "plan.parquet")) > 10
    status = called("status", output, "--json")
    assert (status.returncode, json.loads(status.stdout)["rows"]) == (0, 10)
    result = make(prompts, output, cluster, limit=10)
    assert (result.exit_code, result.summary["rows"]) == (0, 10)
    assert make(prompts, output, cluster, "retry_failed", limit=20).summary["rows"] == 20
    assert make(prompts, output, cluster).summary["rows"] == 100
    assert images(output) == images(Path(make(prompts, tmp_path / "at-once", cluster).output))


KILLED = """
import os, signal, sys
from gaudi_batch import JobConfig, run
from gaudi_batch.storage.store import Storage
put = Storage.put
def dies(self, path, *rest, **options):
    if path == "run.json":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, path, *rest, **options)
Storage.put = dies
run(JobConfig.model_validate_json(sys.argv[1]), address=sys.argv[2])
"""


def test_a_run_takes_no_rows_that_would_move_others_or_have_other_columns(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    """A type that holds the numbers of all files is another than that of the manifests that are there."""
    output = tmp_path / "out"
    for number, path in enumerate(sorted(prompts.iterdir())):
        table = pq.read_table(path)
        table = table.append_column("count", pa.array([number] * len(table), pa.int32()))
        pq.write_table(table, path)
    make(prompts, output, cluster, limit=10)
    before = (output / "run.json").read_bytes()
    added = prompts / "part-05.parquet"
    more: dict[str, Any] = {"prompt": ["more"], "topic": ["t0"]}
    pq.write_table(pa.table(more), added)
    refused = command(prompts, output, cluster)
    assert (refused.returncode, "rows which the run has would get other numbers" in refused.stderr) == (2, True)
    assert "'part-05.parquet' is new and sorts before 'part-2.parquet'" in refused.stderr
    added = added.rename(prompts / "part-3.parquet")
    for columns, why in [
        ({"colour": ["red"]}, "'colour' is string"),
        ({"count": pa.array([1], pa.int64())}, "'count' is int64"),
    ]:
        pq.write_table(pa.table(more | columns), added)
        with pytest.raises(InputError, match=why):
            make(prompts, output, cluster)
    added.unlink()
    with pytest.raises(InputError, match=r"limit: the run has 10 rows and limit 9 would leave some out; .* of 10 or"):
        make(prompts, output, cluster, limit=9)
    with pytest.raises(InputError, match="steps: was 50, is 20"):
        make(prompts, output, cluster, steps=20)
    assert (output / "run.json").read_bytes() == before


@pytest.mark.parametrize("how", ["touched", "copied", "renamed"])
def test_the_same_prompts_are_the_same_wherever_they_lie(how: str, prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster)
    made = paths(output)
    (output / "manifest" / "000000.parquet").unlink()
    if how == "touched":
        for path in prompts.iterdir():
            os.utime(path, (1, 1))
    elif how == "copied":
        shutil.copytree(prompts, tmp_path / "elsewhere")
        shutil.rmtree(prompts)
        prompts = tmp_path / "elsewhere"
    else:
        for path in prompts.iterdir():
            path.rename(prompts / f"the-{path.name}")
    assert make(prompts, output, cluster).exit_code == 0
    assert sum(path != made[row] for row, path in paths(output).items()) == 7


def test_prompts_of_other_content_are_refused(prompts: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster)
    table = pq.read_table(prompts / "part-1.parquet").slice(1)
    pq.write_table(table, prompts / "part-1.parquet", row_group_size=20)
    refused = command(prompts, output, cluster)
    assert (refused.returncode, "prompts file 'part-1.parquet': was" in refused.stderr) == (2, True)
    (prompts / "part-1.parquet").unlink()
    with pytest.raises(InputError, match=r"'part-1.parquet': was .*, is not there"):
        make(prompts, output, cluster)


def test_a_file_that_is_added_to_a_run_that_is_half_done_may_not_bring_columns(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    """Though none of its rows are asked for yet: the shards that are left would get them, too."""
    output = tmp_path / "out"
    make(prompts, output, cluster, limit=50)
    (output / "manifest" / "000001.parquet").unlink()
    added = prompts / "part-3.parquet"
    pq.write_table(pa.table({"prompt": ["p"], "topic": ["t"], "source": ["s"]}), added)
    limited = ("--limit", "50", "--batch-size", "4")
    refused = command(prompts, output, cluster, *limited)
    assert (refused.returncode, "column 'source' is string, and in the manifests" in refused.stderr) == (2, True)
    checked = called("check", "--prompts", prompts, "--output", output, "--device", "simulated", *limited)
    assert (checked.returncode, "column 'source' is string" in checked.stderr) == (2, True), checked.stdout
    pq.write_table(pa.table({"prompt": ["p"], "topic": ["t"]}), added)
    assert make(prompts, output, cluster, limit=50).exit_code == 0
    added.unlink()
    with pytest.raises(InputError, match=r"'part-3.parquet': was .*, is not there"):
        make(prompts, output, cluster, limit=50)


def test_a_plan_that_has_fewer_rows_than_its_run_is_made_whole(prompts: Path, tmp_path: Path, cluster: str) -> None:
    """As when another driver's plan lands after that of the one that made the run grow."""
    output = tmp_path / "out"
    make(prompts, output, cluster, limit=40)
    short = (output / "plan.parquet").read_bytes()
    make(prompts, output, cluster, shard_size=4)
    record = load(output / "run.json")
    sizes = pq.read_table(output / "plan.parquet").column("rows").to_pylist()
    assert max(sizes[-5:]) <= 8, "the size that the run began with"
    for path in (output / "manifest").iterdir():
        if int(path.stem) >= 6:
            path.unlink()
    (output / "plan.parquet").write_bytes(short)
    assert make(prompts, output, cluster).exit_code == 0
    assert images(output) == images(Path(make(prompts, tmp_path / "at-once", cluster).output))
    assert load(output / "run.json")["images"] == record["images"] == 100


def test_a_model_in_a_directory_is_known_by_what_it_holds(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(builtin_directory("builtin:shapes"), tmp_path / "model")
    fields: dict[str, Any] = {"device": "cpu", "cpu": {"threads": 1}}
    begun = resolve(job(prompts, "out", model="model", **fields))
    record, _ = begin_run(Ledger(Storage(str(tmp_path / "out")), Unfenced()), begun, 1)
    shutil.copytree(tmp_path / "model", tmp_path / "copied")
    (tmp_path / "link").symlink_to("model")
    for spelt in ("./model/", str(tmp_path / "model"), "copied", "link", "builtin:shapes"):
        assert differences(record, resolve(job(prompts, "out", model=spelt, **fields))) == []
    with (tmp_path / "copied/unet/config.json").open("a") as file:
        file.write(" ")
    different = differences(record, resolve(job(prompts, "out", model="copied", **fields)))
    assert [line.partition(":")[0] for line in different] == ["model", "model_revision"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    """The output of a finished run of its own prompts, to copy."""
    home = tmp_path_factory.mktemp("made")
    pq.write_table(pa.table({"prompt": ["a", "b", "c"]}), home / "p.parquet")
    return Path(make(home / "p.parquet", home / "out", cluster).output)


WHERE = {
    "output below a glob": ("data/**/*.parquet", "data/out"),
    "output below a directory": ("data", "data/out"),
    "output is the directory": ("data", "data"),
    "prompts inside the output": ("data/prompts", "data"),
    "prompts where a run has images": ("data", "data/prompts"),
    "a glob over the output": ("data/**/*.parquet", "data/prompts"),
    "a glob inside the output": ("data/prompts/**/*.parquet", "data"),
    "by a link": ("link/**/*.parquet", "data/out"),
    "another run's output": ("data", "new"),
    "a glob over another run's": ("data/**/*.parquet", "new"),
}


def test_a_users_own_files_beside_a_run_json_of_something_else_are_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, made: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "manifest", "plan"):
        pq.write_table(pa.table({"prompt": [name]}), data / f"{name}.parquet")
    (data / "run.json").write_text('{"tool": "an exporter"}')
    assert open_prompts(job(data, tmp_path / "out")).rows == 3
    shutil.copytree(made, data / "earlier")
    assert open_prompts(job(data, tmp_path / "out")).rows == 3
    assert "'earlier/manifest.parquet'" in caplog.text
    assert "left out, as a run that lies there has written it" in caplog.text


@pytest.mark.parametrize("where", WHERE)
def test_no_file_of_a_run_is_taken_for_prompts(where: str, made: Path, tmp_path: Path) -> None:
    prompts, output = (tmp_path / name for name in WHERE[where])
    (tmp_path / "link").symlink_to("data")
    data = tmp_path / "data"
    shutil.copytree(made, output if output.is_relative_to(data) else data / "earlier")
    own = [data / "prompts/part-0.parquet", data / "prompts/images/part.parquet", data / "prompts/manifest/p.parquet"]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"prompt": ["d"]}), path)
    dataset = open_prompts(job(prompts, output))
    assert {Path(file.name).name for file in dataset.files} == {path.name for path in own}
    assert dataset.rows == 3


@pytest.mark.thorough
def test_a_run_beside_its_prompts_is_resumed_and_started_afresh(tmp_path: Path, cluster: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"prompt": ["a", "b", "c"]}), data / "p.parquet")
    for prompts, output in [(data / "**/*.parquet", data / "out"), (data, data)]:
        for flags in ((), (), ("--overwrite",)):
            ended = command(prompts, output, cluster, *flags)
            assert (ended.returncode, len(read_manifest(output))) == (0, 3), ended.stderr
            (output / "manifest" / "000000.parquet").unlink()
    assert (data / "p.parquet").exists()


def test_no_file_of_a_run_in_object_storage_is_taken_for_prompts(made: Path, moto: StoreServer, tmp_path: Path) -> None:
    base = Storage(moto.url(tmp_path.name), moto.options)
    for name in ("run.json", "plan.parquet", "manifest.parquet", "manifest/000000.parquet"):
        base.put(f"out/{name}", (made / name).read_bytes())
        base.put(name, (made / name).read_bytes())
    base.put("p.parquet", (made.parent / "p.parquet").read_bytes())
    for prompts, output in [("", "/out"), ("/**/*.parquet", "/out"), ("", ""), ("", "/new")]:
        dataset = open_prompts(job(base.url + prompts, base.url + output, storage_options=moto.options))
        assert [file.name for file in dataset.files] == ["p.parquet"]
