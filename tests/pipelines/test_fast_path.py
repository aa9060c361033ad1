"""New runs take upstream's fast path; a run that began without it goes on without it, or is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gaudi_batch import JobConfig
from gaudi_batch.driver.growth import differences
from gaudi_batch.job import Job, resolve
from gaudi_batch.output.run_info import RunInfo


@pytest.fixture
def job(prompts: Path, tmp_path: Path) -> JobConfig:
    return JobConfig(prompts=str(prompts), output=str(tmp_path / "out"), model="builtin:shapes", device="hpu")


def with_attention(job: JobConfig, fused: bool | None) -> JobConfig:
    return job.model_copy(update={"gaudi": job.gaudi.model_copy(update={"fused_attention": fused})})


def recorded(job: Job) -> RunInfo:
    """What run.json says of a run, once it is written and read."""
    return RunInfo.parse(RunInfo.of(job, []).encode())


def of_an_older_version(job: JobConfig) -> RunInfo:
    info = recorded(resolve(with_attention(job, False)))
    settings: dict[str, Any] = {name: value for name, value in info.job["gaudi"].items() if name != "fused_attention"}
    return replace(info, job=info.job | {"gaudi": settings})


def test_attention_of_a_new_run_is_fused_and_stays_so(job: JobConfig) -> None:
    first = resolve(job)
    assert first.config.gaudi.fused_attention is True
    again = resolve(job, recorded(first).fixed)
    assert again.config.gaudi.fused_attention is True
    assert differences(recorded(first), again) == []


def test_a_run_that_an_older_version_began_stays_as_it_is(job: JobConfig) -> None:
    older = of_an_older_version(job)
    assert "fused_attention" not in older.fingerprint["gaudi"]
    again = resolve(job, older.fixed)
    assert again.config.gaudi.fused_attention is False
    assert differences(older, again) == []


@pytest.mark.parametrize("began_fused", [True, False])
def test_a_run_does_not_change_its_attention(began_fused: bool, job: JobConfig) -> None:
    began = recorded(resolve(job)) if began_fused else of_an_older_version(job)
    (difference,) = differences(began, resolve(with_attention(job, not began_fused), began.fixed))
    assert "fused_attention" in difference
