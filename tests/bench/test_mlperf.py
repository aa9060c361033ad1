"""The published benchmark: its job as its rules have it, and figures that stand beside it only where they may."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import REPOSITORY

from gaudi_batch import JobConfig
from gaudi_batch.bench.mlperf import FAMILY, PUBLISHED, SCHEDULER, Measured, differences, report
from gaudi_batch.job import Job, resolve
from gaudi_batch.pipelines.families import FAMILIES

ON_CARDS = Measured("hpu GAUDI2", 5_000, 8, 1_000.0, 5.5)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """That of jobs/configs, as where the hub has its model."""
    fields = yaml.safe_load((REPOSITORY / "jobs/configs/sdxl-mlperf.yaml").read_text())
    fields |= {"prompts": str(REPOSITORY / fields["prompts"]), "output": str(tmp_path / "out")}
    as_xl = resolve(JobConfig(**fields | {"model": "builtin:shapes", "scheduler": "ddim"}))
    family = next(family for family in FAMILIES if family.name == FAMILY)
    return replace(
        as_xl,
        config=JobConfig(**fields),
        model=replace(as_xl.model, name=fields["model"], family=family, scheduler=SCHEDULER),
    )


def test_the_job_is_the_benchmarks(job: Job) -> None:
    assert differences(job, ON_CARDS) == []
    lines = report(job, ON_CARDS).splitlines()
    assert any(line.split("|")[1:4] for line in lines if "5.000" in line and "0.625" in line)
    (published,) = (line for line in lines if PUBLISHED.source in line)
    assert "6.257" in published
    assert "0.782" in published
    assert "No result of MLPerf" in report(job, ON_CARDS)


@pytest.mark.parametrize(
    ("measured", "field", "wanted"),
    [
        (ON_CARDS._replace(device="hpu GAUDI2 (emulated)"), {}, "the device is hpu GAUDI2 (emulated)"),
        (ON_CARDS._replace(device="simulated"), {}, "the device is simulated"),
        (ON_CARDS._replace(images=20), {}, "images is 20 and there 5000"),
        (ON_CARDS, {"negative_prompt": "ugly"}, "negative_prompt is ugly"),
        (ON_CARDS, {"steps": 30}, "steps is 30 and there 20"),
    ],
)
def test_nothing_published_stands_beside_what_is_another_thing(
    measured: Measured, field: dict[str, Any], wanted: str, job: Job
) -> None:
    job = replace(job, config=job.config.model_copy(update=field))
    text = report(job, measured)
    assert wanted in text
    assert "6.257" not in text
