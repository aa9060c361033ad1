"""The examples of the public names do what they say, and a manifest can be read while its run goes on."""

from __future__ import annotations

import doctest
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers import StoreServer

import gaudi_batch
from gaudi_batch import InputError, JobConfig, RunStopped, load_manifest, run

pytestmark = pytest.mark.usefixtures("thread_cards")

PUBLIC = (
    "GaudiBatchError",
    "InputError",
    "Interrupted",
    "JobConfig",
    "RunResult",
    "RunStopped",
    "StorageError",
    "data_files",
    "load_manifest",
    "run",
)


def test_the_package_offers_these_names_and_no_others() -> None:
    assert tuple(gaudi_batch.__all__) == PUBLIC


@pytest.fixture
def in_a_directory(tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts and a job file, as the examples have it, beside a cluster."""
    pq.write_table(pa.table({"prompt": [f"prompt {row}" for row in range(4)]}), tmp_path / "prompts.parquet")
    (tmp_path / "job.yaml").write_text("prompts: prompts.parquet\noutput: out\ndevice: simulated\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", cluster)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.usefixtures("in_a_directory")
def test_the_example_of_each_public_name_does_what_it_says(name: str) -> None:
    if name in ("data_files", "load_manifest"):
        output_format = "webdataset" if name == "data_files" else "files"
        run(JobConfig.load(None, {**JobConfig.load("job.yaml").model_dump(), "format": output_format}))
    public = getattr(gaudi_batch, name)
    (example,) = [test for test in doctest.DocTestFinder(recurse=False).find(public, name) if test.examples]
    report: list[str] = []
    doctest.DocTestRunner().run(example, out=report.append, clear_globs=False)
    assert not report, "".join(report)


def rows_of(output: Path) -> list[tuple[int, str]]:
    table = load_manifest(output).to_table(columns=["row", "status"])
    return sorted(zip(table.column("row").to_pylist(), table.column("status").to_pylist(), strict=True))


def job(prompts: Path, output: Path, **simulated: Any) -> JobConfig:
    fields: dict[str, Any] = {"simulated": {"batch_seconds": 0.2, **simulated}}
    return JobConfig(
        prompts=str(prompts), output=str(output), device="simulated", shard_size=8, batch_size=8, cards=1, **fields
    )


def test_a_manifest_is_read_while_its_run_goes_on(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    prompts, output = write_prompts({"prompt": ["p"] * 96}), tmp_path / "out"
    counts: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            if (output / "run.json").exists():
                counts.append(load_manifest(output).count_rows())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        run(job(prompts, output), address=cluster)
    finally:
        over.set()
        watching.join()
    assert counts == sorted(counts)
    assert len({count for count in counts if 0 < count < 96}) >= 2, "it grew"
    assert rows_of(output) == [(row, "ok") for row in range(96)]


def test_rows_that_are_made_again_are_in_it_once(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    prompts, output = write_prompts({"prompt": ["p"] * 32}), tmp_path / "out"
    run(job(prompts, output, raise_rows=[3, 20]), address=cluster)
    assert [row for row in rows_of(output) if row[1] == "failed"] == [(3, "failed"), (20, "failed")]
    run(job(prompts, output, raise_rows=[20]), address=cluster, retry_failed=True)
    joined = rows_of(output)
    assert joined == [(row, "failed" if row == 20 else "ok") for row in range(32)]
    (output / "summary.json").unlink()  # as of a run that is not over: the manifests of its shards are read
    assert rows_of(output) == joined
    torn = output / "manifest/000000.parquet"
    torn.write_bytes(torn.read_bytes()[:100])
    assert len(rows_of(output)) < 32, "what is torn is no commit"


def test_a_manifest_in_object_storage_is_read(tmp_path: Path, moto: StoreServer, cluster: str) -> None:
    pq.write_table(pa.table({"prompt": ["p"] * 8, "topic": ["t"] * 8}), tmp_path / "prompts.parquet")
    output = moto.url("public")
    fields: dict[str, Any] = {"storage_options": moto.options, "device": "simulated"}
    run(JobConfig(prompts=str(tmp_path / "prompts.parquet"), output=output, **fields), address=cluster)
    manifest = load_manifest(output, moto.options)
    assert manifest.count_rows(filter=pc.field("topic") == "t") == 8


def test_an_output_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no run here \(no run\.json\)"):
        load_manifest(tmp_path)


def test_a_run_before_its_first_commit_has_an_empty_manifest(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    prompts, output = write_prompts({"prompt": ["p"] * 8}), tmp_path / "out"
    with pytest.raises(RunStopped):
        run(job(prompts, output, unloadable_modules=[0, 1, 2, 3]), address=cluster)
    assert load_manifest(output).count_rows() == 0
    assert "path" in load_manifest(output).schema.names


def test_a_process_may_run_again_from_a_thread_and_keeps_its_own_log(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = write_prompts({"prompt": ["p"] * 8})
    handlers = list(logging.getLogger().handlers)
    with caplog.at_level(logging.INFO, "gaudi_batch"):
        for number in range(2):
            results: list[object] = []

            def call(output: Path = tmp_path / f"out-{number}", results: list[object] = results) -> None:
                results.append(run(job(prompts, output), address=cluster))

            thread = threading.Thread(target=call)
            thread.start()
            thread.join(120)
            assert results, "a run in a thread ends"
    assert logging.getLogger().handlers == handlers
    assert not logging.getLogger("gaudi_batch").handlers
    assert any("is ready after" in message for message in caplog.messages)
