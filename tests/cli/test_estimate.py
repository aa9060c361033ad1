"""`check` says how long a job will take where a card was measured, and nothing where none was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gaudi_batch.bench.rate import Rate
from gaudi_batch.bench.record import Conditions, Measurement, encode_record
from gaudi_batch.cli import main as cli
from gaudi_batch.cli.check import check
from gaudi_batch.cli.estimate import Speed, estimate, speeds_of_summary
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.job import resolve
from gaudi_batch.pipelines.sources import describe_model
from gaudi_batch.plan import Bucket, PlanSummary

ROWS = 3600
TIME = "2026-11-28T10:00:00+00:00"
Times = Callable[..., list[str]]


@pytest.fixture
def times(tmp_path: Path) -> Times:
    """The lines of `check` about time, for a job of 3600 images beside which tune has left a record."""
    pq.write_table(pa.table({"prompt": [f"prompt {row}" for row in range(ROWS)]}), tmp_path / "p.parquet")

    def lines(fields: dict[str, Any], measured: dict[str, Any] | None = None, **changes: Any) -> list[str]:
        base: dict[str, Any] = {
            "prompts": str(tmp_path / "p.parquet"),
            "output": str(tmp_path / "out"),
            "model": "builtin:shapes",
            "device": "hpu",
            "batch_size": 4,
            "steps": 20,
        }
        job = resolve(JobConfig(**(base | (measured or {}))))
        rate = Rate(job.config.batch_size, (2.0,))
        measurement = dataclasses.replace(Measurement.of(job, "hpu GAUDI2", TIME, rate), **changes)
        (tmp_path / "job.tune.json").write_bytes(encode_record([measurement]))
        (tmp_path / "job.yaml").write_text(json.dumps(base | fields))
        checked = check(JobConfig.load(tmp_path / "job.yaml"), job_file=str(tmp_path / "job.yaml"))
        assert checked.refused is None
        return [line for line in checked.text.splitlines() if line.startswith(("time ", "tune "))]

    return lines


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"cards": 8},
            "about 3 min 45 s on 8 cards (from tune of 2026-11-28 on hpu GAUDI2: 2.0 images/s a card; loading",
        ),
        ({"max_cards": 4}, "about 7 min 30 s on 4 cards (from tune"),
        ({"cards": 1}, "about 30 min 00 s on 1 card (from tune"),
        (
            {},
            "about 0.5 card-hours (from tune of 2026-11-28 on hpu GAUDI2: 2.0 images/s a card; loading and",
        ),
        (
            {"cards": 1, "steps": 40},
            "about 1 h 00 min on 1 card (from tune of 2026-11-28 on hpu GAUDI2: 1.0 images/s a card;",
        ),
        ({"cards": 1, "steps": 40}, "; scaled from 20 steps to 40, in proportion; "),
        ({"cards": 1, "limit": 5}, "about 4 s on 1 card"),  # two batches, of which one is filled up
        ({"cards": 8, "limit": 5}, "about 2 s on 2 cards"),  # the others have no shard
        ({"cards": 2, "seed": 7, "guidance_scale": 5.0}, "about 15 min 00 s on 2 cards"),
        ({"cards": 2, "width": 64}, "about 15 min 00 s on 2 cards"),  # the model's own, named
    ],
)
def test_the_time_is_what_tune_has_measured(times: Times, fields: dict[str, Any], expected: str) -> None:
    (line,) = times(fields)
    assert expected in line


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"batch_size": 8}, "tune of 2026-11-28 has measured batch size 4, and the job has 8; `gaudi-batch tune`"),
        ({"dtype": "bfloat16"}, "dtype 'autocast to bfloat16', and the job has 'bfloat16'"),
        ({"device": "cpu"}, "device 'hpu', and the job has 'cpu'"),
        ({"gaudi": {"hpu_graphs": False}}, "'hpu_graphs': True}, and the job has {"),
        (
            {"width": 128},
            "tune of 2026-11-28 has measured 64x64, 20 steps, guidance on, and the job asks for other sizes",
        ),
        (
            {"guidance_scale": 1.0},
            "tune of 2026-11-28 has measured 64x64, 20 steps, guidance on, and the job asks for other",
        ),
    ],
)
def test_what_was_not_measured_is_not_guessed(times: Times, fields: dict[str, Any], why: str) -> None:
    (line,) = times(fields)
    assert line.startswith("time     not known before a first run: ")
    assert why in line
    assert "about" not in line


def test_a_model_that_lies_elsewhere_is_the_same_and_one_with_other_files_is_not(times: Times) -> None:
    def conditions(**change: str) -> Conditions:
        known = {"model": "/models/shapes", "revision": "0" * 64, "scheduler": "GaudiDDIMScheduler"}
        known |= {"dtype": "autocast to bfloat16", "device": "hpu"} | change
        settings = {"config": {"use_torch_autocast": True}, "hpu_graphs": True}
        return Conditions(**known, settings=settings)

    same = describe_model(JobConfig(prompts="p", output="o", model="builtin:shapes", device="hpu")).revision
    (line,) = times({"cards": 1}, conditions=conditions(revision=same))
    assert "about 30 min 00 s" in line
    (line,) = times({"cards": 1}, conditions=conditions())
    assert "not known" in line
    assert "revision '0000" in line


def test_without_a_record_it_says_how_to_get_one(times: Times, tmp_path: Path) -> None:
    times({})
    (tmp_path / "job.tune.json").unlink()
    checked = check(JobConfig.load(tmp_path / "job.yaml"), job_file=str(tmp_path / "job.yaml"))
    assert "time     not known before a first run; `gaudi-batch tune` with the job file measures a card" in checked.text


def test_a_record_that_is_damaged_is_said_and_ends_nothing(times: Times, tmp_path: Path) -> None:
    times({})
    (tmp_path / "job.tune.json").write_text("{")
    checked = check(JobConfig.load(tmp_path / "job.yaml"), job_file=str(tmp_path / "job.yaml"))
    assert checked.refused is None
    assert "tune     " in checked.text
    assert "is no record of tune, or a damaged one" in checked.text
    assert "time     not known" in checked.text


BUCKET = Bucket(512, 512, 50, 7.5)
KIND = BUCKET.batch_kind


def part(images: int) -> PlanSummary:
    return PlanSummary(1, images, images, -(-images // 8), 0)


def test_the_run_s_own_cards_count_before_tune_and_the_same_steps_before_others() -> None:
    run = {KIND: Speed(1.0, "run")}
    tuned = {KIND: Speed(4.0, "tune", fills_up=True), KIND._replace(steps=25): Speed(6.0, "tune", fills_up=True)}
    for sources, steps, seconds in (
        ([run, tuned], 50, 16),
        ([tuned], 50, 4),
        ([run, tuned], 25, 16 / 6),
        ([run], 25, 8),
        ([tuned], 30, 16 / 5),
        ([tuned], 100, 8),
    ):
        guess = estimate({BUCKET._replace(steps=steps): part(16)}, 8, sources)
        assert guess is not None
        assert guess.card_s == pytest.approx(seconds)


def test_what_fills_up_a_batch_takes_time_too() -> None:
    for speed, seconds in ((Speed(4.0, "", fills_up=True), 4), (Speed(4.0, ""), 2.25)):
        guess = estimate({BUCKET: part(9)}, 8, [{KIND: speed}])
        assert guess is not None
        assert guess.card_s == seconds


def test_sizes_that_nothing_has_measured_are_named_and_not_counted() -> None:
    plan = {BUCKET: part(3600), **{BUCKET._replace(width=side): part(10) for side in (64, 128, 192, 256)}}
    guess = estimate(plan, 8, [{KIND: Speed(1.0, "from tune")}])
    assert guess is not None
    assert guess.text(2) == (
        "about 30 min 00 s on 2 cards (from tune: 1.0 images/s a card; loading and warm-up left out); not counted, as"
        " nothing has measured it: 40 images of 64x512, 50 steps, guidance on and 128x512, 50 steps, guidance on and"
        " 192x512, 50 steps, guidance on and 1 more"
    )
    assert estimate({BUCKET: part(1)}, 8, [{}]) is None
    assert estimate({}, 8, [{KIND: Speed(1.0, "")}]) is None


def test_first_batches_alone_are_said_to_be_that() -> None:
    row = {**KIND._asdict(), "card_images_per_s": None, "card_images_per_s_with_warmup": 0.5}
    guess = estimate({BUCKET: part(8)}, 8, [speeds_of_summary({"buckets": [row, {}]})])
    assert guess is not None
    assert guess.text(1).endswith("a card; of first batches, which compile: it will be less)")


@pytest.mark.usefixtures("thread_cards")
def test_a_run_that_was_killed_is_measured_by_its_manifests(
    prompts: Path, tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["--prompts", str(prompts), "--output", str(tmp_path / "out"), "--device", "simulated", "--cards", "2"]
    job += ["--batch-size", "4", "--simulated.batch-seconds", "0.02", "--simulated.capture-seconds", "0.001"]
    assert cli.main(["run", *job, "--limit", "40", "--address", cluster]) == 0
    (tmp_path / "out/summary.json").unlink()
    capsys.readouterr()
    assert cli.main(["check", *job]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]
    assert " for 60 images on 2 cards (from the run in the output: " in line
