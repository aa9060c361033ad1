"""What `tune` writes: the batch size into the job file, the figures beside it, and nothing where it can't."""

from __future__ import annotations

import dataclasses
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.bench.job_file import JobFile
from gaudi_batch.bench.rate import Rate
from gaudi_batch.bench.record import (
    MAX_MEASUREMENTS,
    Conditions,
    Measurement,
    encode_record,
    merged,
    read_record,
    record_path,
)
from gaudi_batch.errors import InputError
from gaudi_batch.pipelines.base import DeviceMemory

CONDITIONS = Conditions("shapes", "abc", "DDIMScheduler", "float32", "cpu", {"threads": 1})
MEASURED = Measurement("2026-11-28T10:00:00+00:00", CONDITIONS, "cpu", 64, 64, 20, True, 4, 5, 0.5, 8.0, None, None)
JOB = "# mine\nprompts: p   # where they are\noutput: o\nbatch_size: 8\n"

NOBODY = 65534


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_the_choice_and_the_figures_are_written_and_nothing_else(job_file: Path) -> None:
    job_file.chmod(0o640)
    assert JobFile(str(job_file)).write(4, [MEASURED]) == 8
    assert job_file.read_text() == JOB.replace("8", "4")
    assert stat.S_IMODE(job_file.stat().st_mode) == 0o640
    assert read_record(record_path(job_file)) == [MEASURED]
    assert sorted(path.name for path in job_file.parent.iterdir()) == ["job.tune.json", "job.yaml"]


def test_looking_whether_it_can_be_written_changes_nothing(job_file: Path) -> None:
    JobFile(str(job_file))
    assert job_file.read_text() == JOB
    assert os.listdir(job_file.parent) == ["job.yaml"]  # noqa: PTH208


def test_what_was_edited_while_the_card_was_measured_stays(job_file: Path) -> None:
    opened = JobFile(str(job_file))
    job_file.write_text(JOB + "steps: 30\n")
    opened.write(4, [MEASURED])
    assert job_file.read_text() == JOB.replace("8", "4") + "steps: 30\n"


def test_a_link_to_a_job_file_stays_a_link(job_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "linked.yaml"
    link.symlink_to(job_file.name)
    JobFile(str(link)).write(4, [MEASURED])
    assert link.is_symlink()
    assert "batch_size: 4" in job_file.read_text()
    assert (tmp_path / "linked.tune.json").is_file()


def test_a_later_measurement_replaces_the_earlier_and_others_stay(job_file: Path) -> None:
    other = dataclasses.replace(MEASURED, batch_size=8)
    later = dataclasses.replace(MEASURED, time="2026-11-29T10:00:00+00:00", latency_s=0.25, images_per_s=16.0)
    JobFile(str(job_file)).write(4, [MEASURED, other])
    JobFile(str(job_file)).write(4, [later])
    assert read_record(record_path(job_file)) == [other, later]


@pytest.mark.parametrize(
    "change",
    [
        {"width": 96},
        {"steps": 21},
        {"guided": False},
        {"batch_size": 2},
        {"device_name": "hpu GAUDI3"},
        {"conditions": dataclasses.replace(CONDITIONS, model="other")},
        {"conditions": dataclasses.replace(CONDITIONS, revision="def")},
        {"conditions": dataclasses.replace(CONDITIONS, dtype="bfloat16")},
        {"conditions": dataclasses.replace(CONDITIONS, settings={"threads": 2})},
    ],
)
def test_measurements_of_anything_else_are_kept_apart(change: dict[str, Any]) -> None:
    assert len(merged([MEASURED], [dataclasses.replace(MEASURED, **change)])) == 2


def test_a_record_does_not_grow_for_ever() -> None:
    many = [dataclasses.replace(MEASURED, width=8 * number) for number in range(1, MAX_MEASUREMENTS + 10)]
    assert merged(many, [MEASURED])[-1] == MEASURED
    assert len(merged(many, [MEASURED])) == MAX_MEASUREMENTS


@given(st.binary(max_size=40) | st.sampled_from([b"[]", b"{}", b'{"measurements": 1}', b'{"measurements": [{}]}']))
def test_what_is_no_record_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("record") / "job.tune.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"job.tune.json' is no record of tune, or a damaged one; remove it"):
        read_record(path)


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "job.tune.json"
    path.write_bytes(encode_record([MEASURED]).replace(b'"calls"', b'"joules": 3, "calls"'))
    assert read_record(path) == [MEASURED]


def test_a_measured_time_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.tune.json"
    path.write_bytes(encode_record([dataclasses.replace(MEASURED, images_per_s=0.0)]))
    with pytest.raises(InputError, match="damaged"):
        read_record(path)


def test_what_can_t_be_written_is_refused_before_anything_is_measured(job_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"job file 'nowhere\.yaml' is no file that could be written"):
        JobFile("nowhere.yaml")
    for odd in ("", "/", ".", "a\0b", "x" * 5000):
        with pytest.raises(InputError, match="is no file that could be written"):
            JobFile(odd)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no file that could be written"):
        JobFile(str(tmp_path / "pipe"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(
        InputError, match="can't be changed so that batch_size alone is another; give batch_size a line"
    ):
        JobFile(str(tmp_path / "list.yaml"))
    (tmp_path / "job.tune.json").mkdir()
    with pytest.raises(InputError, match=r"job.tune.json' is in the place of the record of tune"):
        JobFile(str(job_file))


def test_somebody_s_own_file_in_the_place_of_the_record_is_not_written_over(job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "job.tune.json").write_text("a tune of mine")
    with pytest.raises(InputError, match="is no record of tune"):
        JobFile(str(job_file))
    assert (tmp_path / "job.tune.json").read_text() == "a tune of mine"


@pytest.fixture
def somebody() -> Iterator[Path]:
    """A directory of a user who may not write everywhere, as this process is meanwhile."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        (Path(directory) / "job.yaml").write_text(JOB)
        was = os.geteuid()
        user = NOBODY if was == 0 else was
        for place in (directory, f"{directory}/job.yaml"):
            os.chown(place, user, -1)
        os.setresuid(user, user, was)
        try:
            yield Path(directory)
        finally:
            os.setresuid(was, was, was)
            Path(directory).chmod(0o755)


@pytest.mark.parametrize("read_only", ["job.yaml", ""])
def test_a_read_only_file_or_directory_is_refused(somebody: Path, read_only: str) -> None:
    JobFile(str(somebody / "job.yaml"))
    (somebody / read_only).chmod(0o555)
    with pytest.raises(InputError, match="can't be written, and tune would write its result there"):
        JobFile(str(somebody / "job.yaml"))


def test_a_directory_that_takes_no_file_is_refused(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(
        InputError, match=r"job\.yaml' can't be written.*: Read-only file system; give it a job file in a"
    ):
        JobFile(str(job_file))


def test_a_rate_keeps_what_the_device_tells_of_its_memory() -> None:
    assert Rate(2, (1.0,), DeviceMemory(3, 4)).memory == (3, 4)
