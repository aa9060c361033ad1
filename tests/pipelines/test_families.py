"""Which family a model is of by its files, and what a job of it gets and may not ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gaudi_batch import InputError, JobConfig
from gaudi_batch.cli.check import check
from gaudi_batch.job import resolve
from gaudi_batch.pipelines.families import FAMILIES

XL = {"unet": {"sample_size": 128}}
MODELS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "Stable Diffusion 1 and 2": ("StableDiffusionPipeline", {"unet": {"sample_size": 64}}),
    "Stable Diffusion XL": ("StableDiffusionXLPipeline", XL | {"scheduler": {"timestep_spacing": "leading"}}),
    "Stable Diffusion XL of few steps (Turbo, Lightning)": (
        "StableDiffusionXLPipeline",
        {
            "unet": {"sample_size": 64},
            "scheduler": {"timestep_spacing": "trailing", "prediction_type": "epsilon"},
        },
    ),
    "Stable Diffusion 3": ("StableDiffusion3Pipeline", {"transformer": {"sample_size": 128}}),
    "Stable Diffusion 3.5 medium": (
        "StableDiffusion3Pipeline",
        {"transformer": {"sample_size": 128, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}},
    ),
    "Stable Diffusion 3.5 large turbo": (
        "StableDiffusion3Pipeline",
        {"transformer": {"sample_size": 128, "qk_norm": "rms_norm", "dual_attention_layers": []}},
    ),
    "Stable Diffusion 3.5 large": (
        "StableDiffusion3Pipeline",
        {"transformer": {"sample_size": 128, "qk_norm": "rms_norm", "dual_attention_layers": []}},
    ),
    "FLUX.1 dev": ("FluxPipeline", {"transformer": {"guidance_embeds": True}}),
    "FLUX.1 schnell": ("FluxPipeline", {"transformer": {"guidance_embeds": False}}),
    "Qwen-Image": ("QwenImagePipeline", {"vae": {"z_dim": 16}}),
}
"""The class and the files of a model of each family, as far as they tell it."""
SIDES = {"Stable Diffusion 1 and 2": 512, "Stable Diffusion XL of few steps (Turbo, Lightning)": 512}


def save(directory: Path, name: str) -> Path:
    """The JSON files of a model, and empty weights."""
    pipeline_class, files = MODELS[name]
    parts = {"unet": {}, "transformer": {}, "scheduler": {}, "vae": {"block_out_channels": [1] * 4}} | files
    for part, content in parts.items():
        (directory / part).mkdir(parents=True)
        config = "scheduler_config.json" if part == "scheduler" else "config.json"
        (directory / part / config).write_text(json.dumps(content))
        (directory / part / "model.safetensors").touch()
    (directory / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class}))
    return directory


@pytest.fixture
def job(tmp_path: Path, write_prompts: Callable[..., Path]) -> Callable[..., JobConfig]:
    """A job of a model of a family, with two rows; `columns` are those of its prompts beside the texts."""

    def make(name: str, columns: dict[str, list[Any]] | None = None, **fields: Any) -> JobConfig:
        model = save(tmp_path / name.lower().replace(" ", "-"), name)
        prompts = write_prompts({"prompt": ["a", "b"], **(columns or {})})
        places = {"prompts": str(prompts), "output": str(tmp_path / "out"), "model": str(model)}
        return JobConfig(**places, **{"device": "hpu"} | fields)

    return make


def test_every_family_has_a_model_here() -> None:
    assert [family.name for family in FAMILIES] == [name for name in sorted(MODELS, key=_place)]


def _place(name: str) -> int:
    return next(place for place, family in enumerate(FAMILIES) if family.name == name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("device", ["cpu", "hpu"])
def test_a_model_gets_the_defaults_of_its_family(job: Callable[..., JobConfig], name: str, device: str) -> None:
    resolved = resolve(job(name, device=device))
    family = FAMILIES[_place(name)]
    assert resolved.model.family == family
    side = SIDES.get(name, 1024)
    assert resolved.rules.bucket == (side, side, family.steps, family.guidance_scale)
    assert resolved.fingerprint()["steps"] == family.steps
    schedulers = family.gaudi_schedulers if device == "hpu" else family.schedulers
    assert resolved.model.scheduler == next(iter(schedulers.values()))
    expected = "float32" if device == "cpu" else family.hpu_dtype or "autocast to bfloat16"
    assert resolved.dtype == expected
    assert f"{family.pipeline_class}, {resolved.model.scheduler}" in check(resolved.config).text


@pytest.mark.parametrize("name", MODELS)
def test_what_a_job_says_itself_counts(job: Callable[..., JobConfig], name: str) -> None:
    resolved = resolve(job(name, steps=3, guidance_scale=0.0, width=64, height=128, dtype="float32"))
    assert resolved.rules.bucket == (64, 128, 3, 0.0)
    assert resolved.dtype == "float32"


@pytest.mark.parametrize("name", MODELS)
def test_sides_are_multiples_of_what_the_family_needs(job: Callable[..., JobConfig], name: str) -> None:
    multiple = FAMILIES[_place(name)].multiple
    with pytest.raises(InputError, match=f"width is {64 + multiple // 2}; .* needs a multiple of {multiple}"):
        resolve(job(name, width=64 + multiple // 2, height=64))


@pytest.mark.parametrize("name", MODELS)
def test_a_negative_prompt_is_refused_where_the_model_takes_none(job: Callable[..., JobConfig], name: str) -> None:
    config = job(name, columns={"negative_prompt": [None, "blurry"]})
    bad = 1 if FAMILIES[_place(name)].negative is None else 0
    text = check(config).text
    assert f"{2 - bad} can be run, {bad} can't" in text
    assert ("negative_prompt is given; this model takes none" in text) is bool(bad)


def test_a_job_s_own_negative_prompt_is_refused_before_any_card(job: Callable[..., JobConfig]) -> None:
    with pytest.raises(InputError, match="the job's own negative_prompt is given; this model takes none"):
        resolve(job("FLUX.1 dev", negative_prompt="blurry"))


@pytest.mark.parametrize("scheduler", ["euler_ancestral", "ddim", "heun"])
def test_flow_models_take_their_one_scheduler(job: Callable[..., JobConfig], scheduler: str) -> None:
    with pytest.raises(InputError, match="use flow_match_euler"):
        resolve(job("FLUX.1 dev", scheduler=scheduler))


@pytest.mark.parametrize("name", ["Stable Diffusion 3", "FLUX.1 dev"])
def test_attention_that_is_always_fused_can_not_be_turned_off(job: Callable[..., JobConfig], name: str) -> None:
    with pytest.raises(InputError, match=r"gaudi\.fused_attention is false; .* always fuses it"):
        resolve(job(name, gaudi={"fused_attention": False}))


def test_guidance_is_refused_where_the_model_takes_none(job: Callable[..., JobConfig]) -> None:
    text = check(job("FLUX.1 schnell", columns={"guidance_scale": [1.0, 7.0]})).text
    assert "1 can be run, 1 can't" in text
    assert "guidance_scale is 7.0; this model takes none, and so 1 at most" in text


def test_a_guided_model_whose_steps_are_spaced_from_the_end_is_not_taken_for_one_of_few_steps(
    job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    config = job("Stable Diffusion XL of few steps (Turbo, Lightning)")
    path = Path(str(config.model)) / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"timestep_spacing": "trailing", "prediction_type": "v_prediction"}))
    assert resolve(config).rules.bucket.steps == 50


def test_a_flow_scheduler_that_draws_noise_is_refused(job: Callable[..., JobConfig]) -> None:
    config = job("FLUX.1 dev")
    path = Path(str(config.model)) / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"stochastic_sampling": True}))
    with pytest.raises(InputError, match="has stochastic_sampling, which draws noise"):
        resolve(config)
