"""gaudi-batch in Python: what the package offers by name, how it refuses, and what a run's result knows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from helpers import StoreServer
from smalljob import ROWS, SHARDS, a_job, write_dataset

import gaudi_batch
from gaudi_batch import InputError, JobConfig, RunResult, run


def small(directory: Path, output: str, **fields: object) -> JobConfig:
    directory.mkdir(exist_ok=True)
    write_dataset(directory)
    return JobConfig(**a_job(directory, output, **fields))


def test_dir_lists_what_the_package_offers() -> None:
    assert set(gaudi_batch.__all__) <= set(dir(gaudi_batch))
    for name in gaudi_batch.__all__:
        assert getattr(gaudi_batch, name).__name__ == name
    errors = [value for name in gaudi_batch.__all__ if isinstance(value := getattr(gaudi_batch, name), type)]
    errors = [error for error in errors if issubclass(error, Exception)]
    assert len(errors) == 5
    assert all(issubclass(error, gaudi_batch.GaudiBatchError) for error in errors)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps: 0: input should be greater than or equal to 1"),
        ({"stepz": 3}, "stepz: is not a field of a job"),
        ({"str": {}}, "str: is not a field of a job"),
        ({"encoding": {"int": 1}}, "encoding.int: is not a field of a job"),
        ({"encoding": {"quality": 101}}, "encoding.quality: 101: input should be less than or equal to 100"),
        ({"model": None, "device": "cpu"}, "model: is missing; name a hub id, a directory or builtin:shapes"),
        ({"storage_options": {"key": "hidden-value"}, "encoding": "hidden-value"}, "encoding.type: '***': "),
    ],
)
def test_a_bad_value_in_a_job_is_an_error_of_ours(wrong: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"prompts": "p", "output": "o", "device": "simulated"} | wrong
    makes: tuple[Callable[[], JobConfig], ...] = (
        lambda: JobConfig(**fields),
        lambda: JobConfig.model_validate(fields),
    )
    for make in makes:
        with pytest.raises(Exception) as refused:  # noqa: PT011 of which class is what is asked
            make()
        assert type(refused.value) is InputError
        assert str(refused.value).startswith(message)


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    places: dict[str, Any] = {"prompts": tmp_path / "p", "output": tmp_path / "o", "model": tmp_path / "m"}
    job = JobConfig(**places)
    assert (job.prompts, job.output, job.model) == (str(tmp_path / "p"), str(tmp_path / "o"), str(tmp_path / "m"))


def test_a_job_that_is_no_job_config_is_refused_with_the_way_out() -> None:
    job: Any = {"prompts": "p", "output": "o"}
    with pytest.raises(InputError, match=r"takes a JobConfig and not a dict; JobConfig\(\*\*fields\) makes one"):
        run(job)


@pytest.mark.parametrize("job", ["1: 2", "self: 2", "cls: 2", "[1]", "fields: 3"])
def test_a_job_file_with_odd_names_is_refused_with_a_line(job: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job)
    with pytest.raises(InputError):
        JobConfig.load(tmp_path / "job.yaml")


@pytest.mark.usefixtures("thread_cards")
def test_a_result_knows_its_manifest_and_failed_rows(tmp_path: Path, moto: StoreServer, cluster: str) -> None:
    job = small(tmp_path / "prompts", moto.url("api"), storage_options=moto.options)
    result = run(job, address=cluster)
    assert result.exit_code == 3
    table = result.manifest(columns=["row", "status", "topic"])
    assert sorted(table["row"].to_pylist()) == list(range(ROWS))
    assert set(table.column_names) == {"row", "status", "topic"}
    assert [(row["row"], row["status"], row["topic"]) for row in result.failed_rows()] == [(13, "failed", "topic 13")]
    assert result.manifest_path == moto.url("api/manifest.parquet")
    assert moto.options["secret"] not in repr(result)


def test_failed_rows_are_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gaudi_batch.output import manifest

    table = manifest.COLUMNS.empty_table()
    columns: dict[str, list[Any]] = {name: [None] * 30_000 for name in table.column_names}
    columns["row"] = list(range(30_000))
    columns["status"] = ["failed" if row % 3 else "ok" for row in range(30_000)]
    pq.write_table(pa.table(columns, schema=manifest.COLUMNS), tmp_path / "manifest.parquet", row_group_size=100)
    groups: list[int] = []
    read = pq.ParquetFile.read_row_group

    def noted(file: pq.ParquetFile, group: int, **more: Any) -> pa.Table:
        groups.append(group)
        return read(file, group, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    failed = RunResult(str(tmp_path), {"failed_rows": 20_000}).failed_rows()
    assert [next(failed)["row"] for _ in range(3)] == [1, 2, 4]
    assert groups == [0]
    assert sum(1 for _ in failed) == 20_000 - 3


def in_threads(*calls: Callable[[], object]) -> list[object]:
    """What each returns or raises, all called at once."""
    results: list[object] = [None] * len(calls)
    together = threading.Barrier(len(calls))

    def call(number: int) -> None:
        together.wait()
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_of_two_runs_in_threads_one_is_refused_with_a_sentence(tmp_path: Path, cluster: str) -> None:
    jobs = [small(tmp_path / name, str(tmp_path / f"out-{name}"), cards=1) for name in "ab"]
    results = in_threads(*(lambda job=job: run(job, address=cluster) for job in jobs))
    done = [result for result in results if isinstance(result, RunResult)]
    refused = [result for result in results if isinstance(result, InputError)]
    assert len(done) == 1, results
    assert len(refused) == 1, results
    assert "another run of this process" in str(refused[0])
    assert done[0].summary["images"] == ROWS - 1


def test_two_runs_in_threads_share_a_ray_that_the_application_has_connected(tmp_path: Path, cluster: str) -> None:
    jobs = [small(tmp_path / name, str(tmp_path / f"out-{name}"), cards=1) for name in "ab"]
    ray.init(address=cluster, log_to_driver=False)
    try:
        results = in_threads(*(lambda job=job: run(job) for job in jobs))
    finally:
        ray.shutdown()
    assert [result.summary["images"] for result in results if isinstance(result, RunResult)] == [ROWS - 1] * 2, results
    assert len(list((tmp_path / "out-a/manifest").iterdir())) == SHARDS
