"""The real optimum-habana, unpatched, against diffusers on the CPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from habana_frameworks._emulation.counters import counters
from optimum.habana import GaudiConfig
from optimum.habana.diffusers import GaudiDDIMScheduler, GaudiStableDiffusionPipeline
from optimum.habana.utils import get_driver_version, get_habana_frameworks_version

import gaudi_batch

pytestmark = pytest.mark.thorough

SHAPES = Path(gaudi_batch.__file__).parent / "models" / "shapes"
PROMPTS = ["a red circle on a blue background", "a green square on a white background", "a blue triangle on a red one"]
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain() -> Any:
    return quiet(StableDiffusionPipeline.from_pretrained(SHAPES))


def gaudi(autocast: bool = False, graphs: bool = True) -> Any:
    pipeline = GaudiStableDiffusionPipeline.from_pretrained(
        SHAPES,
        scheduler=GaudiDDIMScheduler.from_pretrained(SHAPES, subfolder="scheduler"),
        use_habana=True,
        use_hpu_graphs=graphs,
        gaudi_config=GaudiConfig(use_torch_autocast=autocast),
        log_level=logging.ERROR,
    )
    return quiet(pipeline)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline: Any, first_seed: int = 0, **options: Any) -> np.ndarray:
    generators = [torch.Generator("cpu").manual_seed(first_seed + number) for number in range(len(PROMPTS))]
    if isinstance(pipeline, GaudiStableDiffusionPipeline):
        options["batch_size"] = len(PROMPTS)
    made = pipeline(prompt=PROMPTS, generator=generators, num_inference_steps=STEPS, output_type="np", **options)
    return np.asarray(made.images)


def test_images_are_those_of_diffusers_and_each_shape_is_captured_once(plain: Any) -> None:
    pipeline = gaudi()
    assert pipeline.device == next(pipeline.unet.parameters()).device == torch.device("hpu", 0)
    captures, replays = counters.captures, counters.replays
    for seed in (0, 10, 20):
        assert np.array_equal(images(pipeline, seed), images(plain, seed))
    assert (counters.captures - captures, counters.replays - replays) == (1, 3 * STEPS - 1)
    for size in ({"height": 96, "width": 64}, {"guidance_scale": 1.0}, {"height": 96, "width": 64}, {}):
        assert np.array_equal(images(pipeline, **size), images(plain, **size))
    assert counters.captures - captures == 3
    assert len(pipeline.cache) == 3


def test_images_are_those_of_diffusers_without_graphs(plain: Any) -> None:
    captures, marks = counters.captures, counters.mark_steps
    assert np.array_equal(images(gaudi(graphs=False)), images(plain))
    assert counters.captures == captures
    assert counters.mark_steps - marks == STEPS + 1


def test_autocast_to_bf16_gives_nearly_the_same_images_on_every_replay(plain: Any) -> None:
    pipeline = gaudi(autocast=True)
    first, second = images(pipeline), images(pipeline)
    assert np.array_equal(first, second)
    assert 0 < np.abs(first - images(plain)).mean() < 0.02


def test_versions_are_those_that_optimum_habana_was_validated_with() -> None:
    from optimum.habana.utils import CURRENTLY_VALIDATED_SYNAPSE_VERSION

    assert get_habana_frameworks_version() == get_driver_version() == CURRENTLY_VALIDATED_SYNAPSE_VERSION
