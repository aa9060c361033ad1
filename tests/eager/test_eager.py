"""Device hpu in eager mode, and the pipelines that need neither lazy mode nor optimum-habana."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import habana_frameworks.torch as ht
import numpy as np
import pytest
import tiny
import torch
from habana_frameworks._emulation.counters import counters

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import Item, Pipeline
from gaudi_batch.pipelines.cpu import CpuPipeline
from gaudi_batch.pipelines.native import NativePipeline
from gaudi_batch.pipelines.sources import describe_model
from gaudi_batch.plan import Bucket

MODELS = {"shapes": 4.0, "xl": 5.0, "sd3": 7.0, "flux": 3.5, "qwen": 4.0, "aura": 3.5, "lcm": 8.5}
"""Tiny models, and a guidance scale for each."""
ITEMS = [
    Item(0, 0, "a red circle", "", 1),
    Item(1, 0, "a large green square on a white background", "", 2),
    Item(2, 0, "a star", "", 3),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | str]:
    directory = tmp_path_factory.mktemp("models")
    built = {name: tiny.save(getattr(tiny, name), directory / name) for name in MODELS if name != "shapes"}
    return {"shapes": "builtin:shapes", **built}


def load(model: Path | str, mode: str, dtype: str | None) -> Any:
    """A pipeline in a mode; `cpu` is the CPU's."""
    device = {"device": "cpu"} if mode == "cpu" else {"device": "hpu", "gaudi": {"mode": mode}}
    config = JobConfig(prompts="p", output="o", model=str(model), dtype=dtype, **device)
    info = describe_model(config)
    return CpuPipeline(info, 1, dtype or "bfloat16") if mode == "cpu" else NativePipeline(config, info, 1)


def images(pipeline: Pipeline, guidance: float, size: tuple[int, int]) -> np.ndarray:
    return pipeline.generate(Bucket(*size, 3, guidance), ITEMS).images


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param(None, marks=pytest.mark.thorough)])
def test_images_are_those_of_diffusers_on_the_cpu(name: str, dtype: str | None, saved: dict[str, Path | str]) -> None:
    """In float32, and in bfloat16, which is the default."""
    card, plain = load(saved[name], "eager", dtype), load(saved[name], "cpu", dtype)
    for guidance, size in ((MODELS[name], (64, 96)), (1.0, (64, 64))):
        assert np.array_equal(images(card, guidance, size), images(plain, guidance, size))
    parameter = next(card._pipeline.vae.parameters())
    assert (parameter.device.type, parameter.dtype) == ("hpu", torch.float32 if dtype else torch.bfloat16)
    assert card.device == "hpu GAUDI2 (emulated)"
    assert "habana-torch-plugin" in card.stack
    assert "optimum-habana" not in card.stack
    assert card.take_memory_peak().peak > 0


def test_no_graph_is_captured_and_no_step_marked() -> None:
    assert not hasattr(ht.hpu, "HPUGraph")
    assert not hasattr(ht.hpu, "wrap_in_hpu_graph")
    with pytest.warns(UserWarning, match="mark_step does nothing"):
        ht.core.mark_step()
    ht.core.mark_step()
    assert (counters.captures, counters.replays, counters.mark_steps) == (0, 0, 0)


def test_a_copy_to_the_host_is_a_launch() -> None:
    before = counters.launches
    torch.ones(2, device="hpu").cpu()
    assert counters.launches == before + 1


def test_mode_compile_says_that_the_emulator_has_no_compiler(saved: dict[str, Path | str]) -> None:
    with pytest.raises(RuntimeError, match=r"torch knows no compiler hpu_backend here.* --gaudi\.mode eager"):
        load(saved["shapes"], "compile", None)


def test_optimum_habana_is_not_imported() -> None:
    importlib.import_module("gaudi_batch.pipelines.native")
    assert not [name for name in sys.modules if name.startswith("optimum.habana")]
