"""The published benchmark: its job as its rules have it, and figures that stand beside it only where they may."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import REPOSITORY, command_line, read_manifest

from gaudi_batch import JobConfig
from gaudi_batch.bench.mlperf import PUBLISHED, Measured, describe, differences, report
from gaudi_batch.job import Job, resolve
from gaudi_batch.pipelines.families import FAMILIES
from gaudi_batch.pipelines.lora import LoraInfo

ON_CARDS = Measured("hpu GAUDI2", 5_000, 8, 1_000.0, 5.5)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    """That of jobs/configs, as where the hub has its model."""
    fields = yaml.safe_load((REPOSITORY / "jobs/configs/sdxl-mlperf.yaml").read_text())
    fields |= {"prompts": str(REPOSITORY / fields["prompts"]), "output": str(tmp_path / "out")}
    as_xl = resolve(JobConfig(**fields | {"model": "builtin:shapes", "scheduler": "ddim"}))
    family = next(family for family in FAMILIES if family.name == "Stable Diffusion XL")
    return replace(
        as_xl,
        config=JobConfig(**fields),
        model=replace(
            as_xl.model, name=fields["model"], family=family, scheduler=family.schedulers[fields["scheduler"]]
        ),
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
        (ON_CARDS, {"num_images": 2}, "num_images is 2 and there 1"),
        (ON_CARDS._replace(device="hpu GAUDI3"), {}, "the device is hpu GAUDI3 and there hpu GAUDI2"),
        (ON_CARDS._replace(failed_rows=1), {}, "failed rows is 1 and there 0"),
    ],
)
def test_nothing_published_stands_beside_what_is_another_thing(
    measured: Measured, field: dict[str, Any], wanted: str, job: Job
) -> None:
    job = replace(job, config=job.config.model_copy(update=field))
    text = report(job, measured)
    assert wanted in text
    assert "6.257" not in text
    assert describe(job, measured)["published"] is None


def test_neither_a_lora_nor_another_model_nor_rows_with_sizes_of_their_own_are_the_benchmark(job: Job) -> None:
    lora = LoraInfo("style", "style.safetensors", 1.0, "revision")
    others = {
        "lora is style": replace(job, model=replace(job.model, loras=(lora,))),
        "model is someone/sdxl": replace(job, model=replace(job.model, name="someone/sdxl")),
    }
    for wanted, other in others.items():
        assert wanted in report(other, ON_CARDS)
    job.dataset.columns["width"] = "width"
    assert "what rows say themselves is width" in report(job, ON_CARDS)


def test_of_another_number_of_cards_only_the_rate_of_one_stands_beside(job: Job) -> None:
    (published,) = (line for line in report(job, ON_CARDS._replace(cards=16)).splitlines() if PUBLISHED.source in line)
    assert "6.257" not in published
    assert "0.782" in published
    nothing = report(job, Measured("hpu GAUDI2", 0, 0, 10.0, None, 5000))
    assert "0.000" not in nothing


@pytest.mark.ray
def test_a_run_is_measured_end_to_end_and_simulated_cards_stand_beside_nothing_published(
    cluster: str, prompts: Path, tmp_path: Path
) -> None:
    job = ("--prompts", prompts, "--output", tmp_path / "out", "--device", "simulated", "--cards", "2")
    told = command_line("bench", "--mlperf", *job, "--simulated.batch-seconds", "0.05", "--address", cluster)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("SIMULATED CARDS")
    assert re.search(r"\| from the command to the last image in storage \| +[\d.]+ +\| +[\d.]+ +\|", told.stdout)
    assert "6.257" not in told.stdout
    assert len(read_manifest(tmp_path / "out")) == 100
    again = command_line("bench", "--mlperf", *job, "--address", cluster)
    assert again.returncode == 2
    assert "holds a run; a measure needs an output of its own" in again.stderr
