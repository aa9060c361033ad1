"""Diffusers on the CPU with the built-in model: the images are diffusers' own, whatever cards and shards there are."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import threadcards
from helpers import called, put_into_hub_cache, read_manifest
from PIL import Image

from gaudi_batch import InputError, JobConfig, run
from gaudi_batch.pipelines.fetching import NO_PEERS
from gaudi_batch.pipelines.sources import BUILTIN_MODELS, ModelInfo, describe_model

pytestmark = pytest.mark.torch

TEXTS = [
    "a large red circle on a blue background",
    "a small white star on a black background",
    "Kreis, größer 🟡",
    "large green square, purple background",
    "x" * 2000,
]


@pytest.fixture(scope="module")
def two_outputs(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> tuple[Path, Path]:
    """The same job on one card and on two, with other shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    home = tmp_path_factory.mktemp("cpu")
    pq.write_table(pa.table({"prompt": TEXTS * 4}), home / "prompts.parquet", row_group_size=7)
    for name, cards, shard_size in (("one", 1, 5), ("two", 2, 12)):
        job = JobConfig(
            prompts=str(home / "prompts.parquet"),
            output=str(home / name),
            model="builtin:shapes",
            device="cpu",
            cards=cards,
            shard_size=shard_size,
            batch_size=4,
            steps=4,
            negative_prompt="blurry",
            cpu={"threads": 1},
        )
        with pytest.MonkeyPatch.context() as patched:
            if cards == 1:  # two threads can't load a pipeline at the same moment
                threadcards.put_in_place(patched)
            assert run(job, address=cluster).exit_code == 0
    return home / "one", home / "two"


def test_one_card_or_two_give_the_same_bytes(two_outputs: tuple[Path, Path]) -> None:
    one, two = ({row["row"]: row["sha256"] for row in read_manifest(output)} for output in two_outputs)
    assert one == two
    assert len(set(one.values())) == len(one) == 20


def test_the_images_are_those_of_diffusers(two_outputs: tuple[Path, Path]) -> None:
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(BUILTIN_MODELS / "shapes", use_safetensors=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    rows = sorted(read_manifest(two_outputs[1]), key=lambda row: row["row"])[:4]
    made = pipeline(
        [row["prompt"] for row in rows],
        negative_prompt=["blurry"] * 4,
        generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in rows],
        num_inference_steps=4,
        guidance_scale=7.5,
        output_type="pil",
    ).images
    for row, image in zip(rows, made, strict=True):
        ours = Image.open(two_outputs[1] / row["path"])
        assert np.array_equal(np.asarray(ours), np.asarray(image))
        assert ours.size == (row["width"], row["height"]) == (64, 64)


def test_a_prompt_that_the_text_encoder_can_not_hold_is_marked(two_outputs: tuple[Path, Path]) -> None:
    assert {row["row"]: row["truncated"] for row in read_manifest(two_outputs[0]) if row["row"] < 5} == {
        0: False, 1: False, 2: False, 3: False, 4: True
    }  # fmt: skip


def test_the_same_pixels_encode_to_the_same_file(two_outputs: tuple[Path, Path]) -> None:
    row = read_manifest(two_outputs[0])[0]
    data = (two_outputs[0] / row["path"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == row["sha256"]
    again = io.BytesIO()
    Image.open(io.BytesIO(data)).save(again, "PNG")
    assert again.getvalue() == data


@pytest.mark.usefixtures("thread_cards")
def test_a_run_that_finds_out_its_device_connects_once(
    prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[str] = []
    connect = ray.init

    def noted(*arguments: Any, **named: Any) -> Any:
        connections.append(named["address"])
        return connect(*arguments, **named)

    monkeypatch.setattr(ray, "init", noted)
    output = tmp_path / "out"
    job = JobConfig(prompts=str(prompts), output=str(output), model="builtin:shapes", limit=2, steps=2, cards=1)
    assert job.device == "auto"
    assert run(job, address=cluster).summary["images"] == 2
    assert json.loads((output / "run.json").read_text())["job"]["device"] == "cpu"
    assert connections == [cluster]
    assert not ray.is_initialized()


@pytest.mark.usefixtures("thread_cards")
def test_a_model_with_broken_weights_stops_the_run_with_the_cards_error(
    prompts: Path, tmp_path: Path, cluster: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUILTIN_MODELS / "shapes", model)
    weights = next((model / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    command = ("run", "--prompts", prompts, "--output", tmp_path / "out", "--device", "cpu", "--model", model)
    result = called(*command, "--cards", "1", "--address", cluster)
    assert result.returncode == 1
    assert "no card is left" in result.stderr
    assert "Traceback" not in result.stderr


def config(model: Path | str, **fields: str) -> JobConfig:
    return JobConfig(prompts="p", output="o", model=str(model), device="cpu", **fields)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "model_index.json").unlink(), "has no model_index.json"),
        (lambda model: (model / "model_index.json").write_text("{"), "can't be read"),
        (lambda model: (model / "model_index.json").write_text('{"_class_name": "WanPipeline"}'), "is a WanPipeline"),
        (lambda model: [path.unlink() for path in model.glob("vae/*.safetensors")], "its vae has no .safetensors"),
    ],
)
def test_a_model_that_can_not_run_is_refused_before_any_card(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(BUILTIN_MODELS / "shapes", tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        describe_model(config(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "message"),
    [("euler_ancestral", "draws noise while it steps"), ("magic", "is not known for device cpu; use one of")],
)
def test_a_scheduler_that_can_not_be_used_is_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe_model(config("builtin:shapes", scheduler=name))


def test_what_shapes_an_image_changes_the_revision_of_a_directory(tmp_path: Path) -> None:
    shutil.copytree(BUILTIN_MODELS / "shapes", tmp_path / "model")
    before = describe_model(config(tmp_path / "model"))
    assert before.revision == describe_model(config("builtin:shapes")).revision
    (tmp_path / "model/README.md").write_text("another card")
    assert describe_model(config(tmp_path / "model")).revision == before.revision
    weights = next((tmp_path / "model/vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert describe_model(config(tmp_path / "model")).revision != before.revision


def test_a_card_has_the_built_in_model_of_its_own_package(tmp_path: Path) -> None:
    from gaudi_batch.pipelines.loading import fetch

    shutil.copytree(BUILTIN_MODELS / "shapes", tmp_path / "where the driver has it")
    info = vars(describe_model(config("builtin:shapes"))) | {"path": str(tmp_path / "where the driver has it")}
    assert fetch(ModelInfo(**info), NO_PEERS) == str(BUILTIN_MODELS / "shapes")


def test_a_hub_model_is_resolved_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = put_into_hub_cache(tmp_path, "someone/shapes", BUILTIN_MODELS / "shapes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    info = describe_model(config("someone/shapes"))
    assert (info.hub, info.path, info.revision, info.width) == (True, "someone/shapes", commit, 64)
    with pytest.raises(InputError, match="'someone/other': no such directory here"):
        describe_model(config("someone/other"))
    with pytest.raises(InputError, match="at revision 'v9'"):
        describe_model(config("someone/shapes", revision="v9"))


@pytest.mark.usefixtures("thread_cards")
def test_a_hub_model_runs_from_the_cache(
    prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = put_into_hub_cache(tmp_path / "hub", "someone/shapes", BUILTIN_MODELS / "shapes", "v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    named = config("someone/shapes", revision="v1")
    fields = {"prompts": str(prompts), "output": str(tmp_path / "out"), "limit": 3, "steps": 2, "cards": 1}
    assert run(named.model_copy(update=fields), address=cluster).summary["images"] == 3
    assert commit in (tmp_path / "out/run.json").read_text()
