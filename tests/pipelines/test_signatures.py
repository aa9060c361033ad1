"""Classes of diffusers that the table of families does not have: what their call says is enough to make images."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gaudi_batch import InputError, JobConfig
from gaudi_batch.pipelines.base import Item
from gaudi_batch.pipelines.families import FAMILIES
from gaudi_batch.pipelines.signatures import family_of
from gaudi_batch.pipelines.sources import BUILTIN_MODELS, describe_model
from gaudi_batch.plan import Bucket

TEXT_TO_IMAGE = [
    "AuraFlowPipeline",
    "ChromaPipeline",
    "CogView4Pipeline",
    "HiDreamImagePipeline",
    "HunyuanDiTPipeline",
    "Kandinsky3Pipeline",
    "LatentConsistencyModelPipeline",
    "Lumina2Pipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    *dict.fromkeys(family.pipeline_class for family in FAMILIES),
]
OTHERS = [
    "CogVideoXPipeline",
    "CogVideoXFunControlPipeline",
    "FluxControlPipeline",
    "FluxKontextPipeline",
    "LattePipeline",
    "StableAudioPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionUpscalePipeline",
    "TextToVideoSDPipeline",
    "WanPipeline",
    "WuerstchenPriorPipeline",
    "no_such_class",
    "os.system(",
]
STEPS = 3
BUCKET = Bucket(64, 96, STEPS, 4.0)
ITEMS = [Item(row, 0, prompt, "", row) for row, prompt in enumerate(["a red circle", "a blue square", "a star"])]


@pytest.mark.torch
@pytest.mark.parametrize("name", TEXT_TO_IMAGE)
def test_a_class_is_called_as_its_signature_says(name: str) -> None:
    import diffusers

    family = family_of(name, {"transformer": ["diffusers", "T"], "tokenizer": ["transformers", "T"]})
    assert family is not None
    called = inspect.signature(getattr(diffusers, name).__call__).parameters
    assert family.steps == called["num_inference_steps"].default
    assert family.guidance in called
    assert family.guidance_scale == called[str(family.guidance)].default
    assert (family.negative is not None) == ("negative_prompt" in called)
    assert all(argument in called for argument in (*family.always, "height", "width", "generator", "output_type"))


@pytest.mark.parametrize("name", OTHERS)
def test_a_class_that_makes_no_images_from_texts_alone_is_none(name: str) -> None:
    assert family_of(name, {}) is None


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import tiny

    directory = tmp_path_factory.mktemp("models")
    return {name: tiny.save(getattr(tiny, name), directory / name) for name in ("aura", "lcm")}


def config(model: Path, **fields: Any) -> JobConfig:
    return JobConfig(model=str(model), **{"prompts": "p", "output": "o", "device": "cpu"} | fields)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["aura", "lcm"])
def test_its_images_are_those_of_diffusers_and_do_not_depend_on_their_neighbours(
    name: str, tiny_models: dict[str, Path]
) -> None:
    import torch
    from diffusers import DiffusionPipeline

    from gaudi_batch.pipelines.cpu import CpuPipeline

    model = describe_model(config(tiny_models[name]))
    assert (model.width, model.height, model.scheduler) == (64, 64, None)
    pipeline = CpuPipeline(model, 1, "float32")
    made = pipeline.generate(BUCKET, ITEMS).images
    assert made.shape == (3, 96, 64, 3)
    upstream = DiffusionPipeline.from_pretrained(tiny_models[name])
    upstream.set_progress_bar_config(disable=True)
    named = {"negative_prompt": [""] * 3} if name == "aura" else {}
    expected = upstream(
        [item.prompt for item in ITEMS],
        num_inference_steps=STEPS,
        width=64,
        height=96,
        guidance_scale=4.0,
        generator=[torch.Generator("cpu").manual_seed(item.seed) for item in ITEMS],
        output_type="np",
        **named,
    ).images
    assert np.array_equal(made, expected)
    others = pipeline.generate(BUCKET, [ITEMS[1], ITEMS[1]._replace(prompt="another", seed=9), ITEMS[2]]).images
    assert np.array_equal(others[[0, 2]], made[[1, 2]])


def renamed(model: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    index = json.loads((model / "model_index.json").read_text())
    change(index)
    (model / "model_index.json").write_text(json.dumps(index))
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The built-in model's JSON files."""
    for path in (BUILTIN_MODELS / "shapes").rglob("*"):
        if path.suffix in (".json", ".safetensors"):
            place = tmp_path / "model" / path.relative_to(BUILTIN_MODELS / "shapes")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes() if path.suffix == ".json" else b"")
    return tmp_path / "model"


def test_it_runs_wherever_diffusers_own_pipelines_do(model: Path) -> None:
    renamed(model, lambda index: index.update(_class_name="LatentConsistencyModelPipeline"))
    native: list[dict[str, Any]] = [{"device": "hpu", "gaudi": {"mode": mode}} for mode in ("compile", "eager")]
    for fields in ({"device": "cpu"}, *native):
        described = describe_model(config(model, **fields))
        assert (described.family.steps, described.family.guidance_scale) == (4, 8.5)
        with pytest.raises(InputError, match="keeps its own; leave scheduler out"):
            describe_model(config(model, scheduler="ddim", **fields))
    with pytest.raises(InputError, match=r"--gaudi.mode compile or eager all text-to-image classes of diffusers"):
        describe_model(config(model, device="hpu"))


def test_a_class_that_makes_no_images_is_refused_by_name(model: Path) -> None:
    renamed(model, lambda index: index.update(_class_name="StableDiffusionUpscalePipeline"))
    with pytest.raises(InputError, match="StableDiffusionUpscalePipeline, which is no class of the diffusers"):
        describe_model(config(model))


def test_a_model_that_does_not_say_its_size_wants_one(model: Path, write_prompts: Callable[..., Path]) -> None:
    from gaudi_batch.job import resolve

    renamed(model, lambda index: index.update(_class_name="LatentConsistencyModelPipeline"))
    (model / "vae/config.json").unlink()
    job = config(model, prompts=str(write_prompts({"prompt": ["a"]})))
    with pytest.raises(InputError, match="does not say how large its images are; name width and height"):
        resolve(job)
    assert resolve(job.model_copy(update={"width": 64, "height": 96})).rules.bucket[:2] == (64, 96)
