"""Sizes of images for which a device has no memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gaudi_batch import JobConfig, RunStopped, load_manifest, run
from gaudi_batch.pipelines.base import Generated, Item, OutOfDeviceMemory
from gaudi_batch.pipelines.simulated import SimulatedPipeline
from gaudi_batch.plan import Bucket


@pytest.mark.usefixtures("thread_cards")
@pytest.mark.parametrize("cards", [1, 2])
def test_a_size_that_does_not_fit_is_set_aside_and_the_others_are_made(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch, cards: int
) -> None:
    generate = SimulatedPipeline.generate

    def generate_small(pipeline: SimulatedPipeline, bucket: Bucket, items: list[Item]) -> Generated:
        if bucket.width == 128:
            raise OutOfDeviceMemory("out of device memory at batch size 4 (128x64, 50 steps, guidance 7.5)")
        return generate(pipeline, bucket, items)

    monkeypatch.setattr(SimulatedPipeline, "generate", generate_small)
    prompts = write_prompts({"prompt": [f"p{row}" for row in range(40)], "width": [64, 128, 64, 96] * 10})
    job = JobConfig(
        prompts=str(prompts),
        output=str(tmp_path / "out"),
        device="simulated",
        cards=cards,
        batch_size=4,
        shard_size=4,
        height=64,
        simulated={"batch_seconds": 0.0},
    )
    size = "4 images of 128x64 with guidance; a --batch-size of 2, in a new output, may fit; "
    with pytest.raises(RunStopped, match=f"stopped: no device has memory for batches of {size}"):
        run(job, address=cluster)
    assert json.loads((tmp_path / "out/summary.json").read_text())["state"] == "stopped"
    made = load_manifest(job.output).to_table(columns=["row"]).column("row").to_pylist()
    assert sorted(made) == [row for row in range(40) if row % 4 != 1]
