"""Optimum-habana's pipelines for Stable Diffusion XL, Stable Diffusion 3 and FLUX, unpatched, against diffusers."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import habana_frameworks.torch as ht
import numpy as np
import pytest
import tiny
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from habana_frameworks._emulation.counters import counters
from habana_frameworks.torch.hpex.normalization import FusedRMSNorm
from optimum.habana import GaudiConfig
from optimum.habana import diffusers as gaudi_diffusers
from optimum.habana.diffusers import GaudiFluxPipeline, GaudiStableDiffusion3Pipeline, GaudiStableDiffusionXLPipeline

pytestmark = pytest.mark.thorough

PROMPTS = ["a red circle on a blue background", "a green square on a white background", "a blue triangle on a red one"]
NEGATIVE = {"negative_prompt": ["blurry"] * len(PROMPTS)}
STEPS = 3


class FilledSd3Pipeline(StableDiffusion3Pipeline):
    """Diffusers' own, its prompts filled up with zeros as optimum-habana does it, to multiples of 256 bytes an element.

    The transformer attends to these zeros too: that, and nothing else, is why optimum-habana's images are others.
    """

    def encode_prompt(self, *args: Any, **kwargs: Any) -> list[torch.Tensor | None]:
        """What the pipeline's own gives, with longer embeddings."""
        *embeddings, pooled, negative_pooled = super().encode_prompt(*args, **kwargs)
        missing = -embeddings[0].shape[1] % (256 // embeddings[0].element_size())
        filled = [made if made is None else torch.nn.functional.pad(made, (0, 0, 0, missing)) for made in embeddings]
        return [*filled, pooled, negative_pooled]


class Family(NamedTuple):
    """A pipeline class: its tiny model, what computes it on the host, and what on the device."""

    build: Callable[[], Any]
    plain: type
    gaudi: type
    shapes: int
    """Graphs for a square, an upright and a lying image: FLUX makes a row of an image, as long for either of these."""
    marks: int
    """Calls of mark_step for a batch without graphs."""


FAMILIES = {
    "xl": Family(tiny.xl, StableDiffusionXLPipeline, GaudiStableDiffusionXLPipeline, shapes=3, marks=STEPS + 1),
    "sd3": Family(tiny.sd3, FilledSd3Pipeline, GaudiStableDiffusion3Pipeline, shapes=3, marks=STEPS),
    "flux": Family(tiny.flux, FluxPipeline, GaudiFluxPipeline, shapes=2, marks=0),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
guided_family = pytest.mark.parametrize("name", ["xl", "sd3"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: tiny.save(family.build, directory / name) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def plain(saved: dict[str, Path]) -> dict[str, Any]:
    return {name: quiet(family.plain.from_pretrained(saved[name])) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def shared(saved: dict[str, Path]) -> dict[str, Any]:
    """Pipelines with graphs, of which other tests may have captured some."""
    return {name: gaudi(saved, name) for name in FAMILIES}


def gaudi(saved: dict[str, Path], name: str, autocast: bool = False, graphs: bool = True, **options: Any) -> Any:
    pipeline = FAMILIES[name].gaudi.from_pretrained(
        saved[name],
        use_habana=True,
        use_hpu_graphs=graphs,
        gaudi_config=GaudiConfig(use_torch_autocast=autocast),
        log_level=logging.ERROR,
        **options,
    )
    return quiet(pipeline)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: Any, first_seed: int = 0, **options: Any) -> np.ndarray:
    usual = {
        "generator": [torch.Generator("cpu").manual_seed(first_seed + number) for number in range(len(PROMPTS))],
        "height": 64,
        "width": 64,
        "num_inference_steps": STEPS,
        "output_type": "np",
    }
    if hasattr(pipeline, "gaudi_config"):
        usual["batch_size"] = len(PROMPTS)
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        usual["max_sequence_length"] = 24
    made = pipeline(prompt=PROMPTS, **(usual | options)).images
    return np.asarray(made.cpu() if torch.is_tensor(made) else made)


def differ(some: np.ndarray, others: np.ndarray) -> bool:
    return bool(np.abs(some - others).max() > 0.01)


def scheduler(name: str, pipeline: Any, **options: Any) -> Any:
    """A scheduler of diffusers or optimum-habana with the settings of a pipeline's own."""
    source = gaudi_diffusers if name.startswith("Gaudi") else diffusers
    return getattr(source, name).from_config(pipeline.scheduler.config, **options)


@each_family
def test_images_are_those_of_diffusers_and_each_shape_is_captured_once(
    saved: dict[str, Path], plain: dict[str, Any], name: str
) -> None:
    ours, of_diffusers = gaudi(saved, name), plain[name]
    captures, replays = counters.captures, counters.replays
    seen: list[np.ndarray] = []
    for options in ({}, {"first_seed": 10}, {"guidance_scale": 9.0}, {"num_inference_steps": STEPS + 2}):
        expected = images(of_diffusers, **options)
        assert all(differ(expected, others) for others in seen)
        assert np.array_equal(images(ours, **options), expected)
        seen.append(expected)
    assert (counters.captures - captures, counters.replays - replays) == (1, 4 * STEPS + 2 - 1)
    for size in ({"height": 96}, {"width": 96}, {}, {"height": 96}):
        assert np.array_equal(images(ours, **size), images(of_diffusers, **size))
    assert counters.captures - captures == FAMILIES[name].shapes


@each_family
def test_images_without_graphs_are_the_same(saved: dict[str, Path], plain: dict[str, Any], name: str) -> None:
    ours, expected = gaudi(saved, name, graphs=False), images(plain[name])
    captures, marks = counters.captures, counters.mark_steps
    assert np.array_equal(images(ours), expected)
    assert (counters.captures - captures, counters.mark_steps - marks) == (0, FAMILIES[name].marks)


@each_family
def test_a_short_batch_is_filled_up_and_captures_nothing(
    shared: dict[str, Any], plain: dict[str, Any], name: str
) -> None:
    captures, replays = counters.captures, counters.replays
    assert np.array_equal(images(shared[name], batch_size=2), images(plain[name]))
    assert (counters.captures - captures, counters.replays - replays) == (1, 2 * STEPS - 1)


@each_family
def test_images_in_bf16_are_those_of_diffusers_in_bf16(saved: dict[str, Path], name: str) -> None:
    low = {"torch_dtype": torch.bfloat16}
    of_diffusers = quiet(FAMILIES[name].plain.from_pretrained(saved[name], **low))
    expected, ours = images(of_diffusers), gaudi(saved, name, **low)
    if name == "sd3":  # whose joint attention has a fused RMS norm, which rounds at its end only
        assert 0 < np.abs(images(ours) - expected).mean() < 0.005
        for block in of_diffusers.transformer.transformer_blocks:
            for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                norm = getattr(block.attn, part)
                norm.forward = partial(FusedRMSNorm.apply, gamma=norm.weight, epsilon=norm.eps)
        expected = images(of_diffusers)
    assert np.array_equal(images(ours), expected)
    assert np.array_equal(images(ours), expected)


@guided_family
def test_autocast_gives_nearly_the_same_images_on_every_replay(
    saved: dict[str, Path], plain: dict[str, Any], name: str
) -> None:
    expected, ours = images(plain[name]), gaudi(saved, name, autocast=True)
    first, second = images(ours), images(ours)
    assert np.array_equal(first, second)
    assert 0 < np.abs(first - expected).mean() < 0.01


@guided_family
def test_a_negative_prompt_is_heeded_and_captures_nothing(
    shared: dict[str, Any], plain: dict[str, Any], name: str
) -> None:
    expected = images(plain[name])
    assert np.array_equal(images(shared[name]), expected)
    captures = counters.captures
    with_negative = images(plain[name], **NEGATIVE)
    assert differ(with_negative, expected)
    assert np.array_equal(images(shared[name], **NEGATIVE), with_negative)
    assert counters.captures == captures


def test_xl_without_guidance_fails_as_it_gives_the_unet_twice_too_many_sizes(
    shared: dict[str, Any], plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, without = shared["xl"], {"guidance_scale": 1.0}
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        images(ours, **without)
    split = ours._split_inputs_into_batches
    monkeypatch.setattr(ours, "_split_inputs_into_batches", lambda *inputs: split(*inputs[:-1], None))
    assert np.array_equal(images(ours, **without), images(plain["xl"], **without))


@pytest.mark.parametrize(
    "kind",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "GaudiDDIMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_schedulers_of_xl_that_take_a_generator_for_each_image(
    shared: dict[str, Any], plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ours, of_diffusers = shared["xl"], plain["xl"]
    monkeypatch.setattr(ours, "scheduler", scheduler(kind, ours))
    monkeypatch.setattr(of_diffusers, "scheduler", scheduler(kind.removeprefix("Gaudi"), of_diffusers))
    for steps in (STEPS, STEPS + 2):
        assert np.array_equal(images(ours, num_inference_steps=steps), images(of_diffusers, num_inference_steps=steps))


def test_gaudis_euler_takes_no_list_of_generators_and_needs_none_for_given_latents(
    shared: dict[str, Any], plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, of_diffusers = shared["xl"], plain["xl"]
    monkeypatch.setattr(ours, "scheduler", scheduler("GaudiEulerDiscreteScheduler", ours))
    with pytest.raises(TypeError, match="randn"):
        images(ours)
    latents = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for steps in (STEPS, STEPS + 2):
        given = {"latents": latents, "generator": None, "num_inference_steps": steps}
        assert np.array_equal(images(ours, **given), images(of_diffusers, **given))


def test_pndm_ends_early_in_xl_which_counts_steps_and_not_evaluations(
    shared: dict[str, Any], plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(_: Any, number: int, time: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        after.append(state["latents"].numpy())
        return state

    after: list[np.ndarray] = []
    ours, of_diffusers = shared["xl"], plain["xl"]
    for pipeline in (ours, of_diffusers):
        monkeypatch.setattr(pipeline, "scheduler", scheduler("PNDMScheduler", pipeline, skip_prk_steps=True))
    images(of_diffusers, callback_on_step_end=keep)
    made = images(ours, output_type="latent")
    assert [np.array_equal(made, latents) for latents in after] == [False] * (STEPS - 1) + [True, False]


def test_sd3_differs_from_diffusers_where_its_prompts_are_filled_up(
    saved: dict[str, Path], shared: dict[str, Any]
) -> None:
    ours, of_diffusers = shared["sd3"], quiet(StableDiffusion3Pipeline.from_pretrained(saved["sd3"]))
    assert differ(images(ours), images(of_diffusers))
    whole = {"max_sequence_length": 256 // 4 - ours.tokenizer_max_length}
    assert np.array_equal(images(ours, **whole), images(of_diffusers, **whole))


def test_sd3_without_its_t5_and_without_guidance(saved: dict[str, Path]) -> None:
    without = {"text_encoder_3": None, "tokenizer_3": None}
    ours, of_diffusers = (
        gaudi(saved, "sd3", **without),
        quiet(FilledSd3Pipeline.from_pretrained(saved["sd3"], **without)),
    )
    for guidance in (7.0, 1.0):
        assert np.array_equal(images(ours, guidance_scale=guidance), images(of_diffusers, guidance_scale=guidance))
    assert len(ours.cache) == 2


def test_flux_keeps_its_graphs_in_the_transformer(shared: dict[str, Any]) -> None:
    ours = shared["flux"]
    first = images(ours)
    captures, memory = counters.captures, ht.hpu.memory_allocated()
    ours.transformer.clear_cache()
    gc.collect()
    assert ht.hpu.memory_allocated() < memory
    assert np.array_equal(images(ours), first)
    assert counters.captures - captures == 1
    assert ours.cache == {}


def test_flux_heeds_neither_autocast_nor_a_negative_prompt(saved: dict[str, Path], plain: dict[str, Any]) -> None:
    assert np.array_equal(images(gaudi(saved, "flux", autocast=True), **NEGATIVE), images(plain["flux"]))
