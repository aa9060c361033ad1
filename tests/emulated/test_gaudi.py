"""The product's own pipeline on emulated cards: diffusers' images, graphs captured once, errors that say what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from habana_frameworks._emulation import faults
from habana_frameworks._emulation.counters import counters

from gaudi_batch.card.recipe_keeper import RecipeKeeper
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import DeviceError, Item
from gaudi_batch.pipelines.cpu import CpuPipeline
from gaudi_batch.pipelines.gaudi import GaudiPipeline
from gaudi_batch.pipelines.gaudi_environment import recipes_of
from gaudi_batch.pipelines.sources import BUILTIN_MODELS, describe_model
from gaudi_batch.plan import Bucket
from gaudi_batch.storage.store import Storage

SQUARE, WIDE, PLAIN = Bucket(64, 64, 3, 7.5), Bucket(96, 64, 3, 7.5), Bucket(64, 64, 3, 1.0)
ITEMS = [
    Item(0, 0, "a large red circle on a blue background", "blurry", 5),
    Item(0, 1, "a large red circle on a blue background", "blurry", 2**63 - 1),
    Item(7, 0, "Kreis, größer 🟡 " * 80, "", 7),
]


def job(model: str | Path = "builtin:shapes", **fields: Any) -> JobConfig:
    fields = {"device": "hpu", "dtype": "float32", "batch_size": len(ITEMS)} | fields
    return JobConfig(prompts="p", output="o", model=str(model), **fields)


def load(config: JobConfig) -> GaudiPipeline:
    return GaudiPipeline(config, describe_model(config), threads=1)


@pytest.fixture(scope="module")
def pipeline() -> GaudiPipeline:
    return load(job())


@pytest.fixture(scope="module")
def plain() -> Iterator[CpuPipeline]:
    threads = torch.get_num_threads()
    yield CpuPipeline(describe_model(job(device="cpu")), 1, "float32")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bucket", [SQUARE, WIDE, PLAIN])
def test_images_are_those_of_the_cpu(pipeline: GaudiPipeline, plain: CpuPipeline, bucket: Bucket) -> None:
    ours, expected = pipeline.generate(bucket, ITEMS), plain.generate(bucket, ITEMS)
    assert np.array_equal(ours.images, expected.images)
    assert ours.images.shape == (3, bucket.height, bucket.width, 3)
    assert ours.truncated == expected.truncated == [False, False, True]
    assert ours.nsfw == [None] * 3


def test_images_without_graphs_are_the_same(plain: CpuPipeline) -> None:
    captures = counters.captures
    ours = load(job(gaudi={"hpu_graphs": False})).generate(SQUARE, ITEMS)
    assert np.array_equal(ours.images, plain.generate(SQUARE, ITEMS).images)
    assert counters.captures == captures


def attentions(pipeline: GaudiPipeline, bucket: Bucket) -> int:
    """Calls of the fused kernel for one batch."""
    before: int = counters.fused_attentions
    pipeline.generate(bucket, ITEMS)
    return int(counters.fused_attentions) - before


@pytest.mark.parametrize("graphs", [True, False])
def test_every_attention_of_every_step_is_fused(graphs: bool) -> None:
    """Also in the replays of a graph, which compute what was captured."""
    pipeline = load(job(gaudi={"hpu_graphs": graphs}))
    layers = len(pipeline._pipeline.unet.attn_processors)
    for bucket in (SQUARE, SQUARE, WIDE, PLAIN, SQUARE._replace(steps=5)):
        assert attentions(pipeline, bucket) == layers * bucket.steps
    assert layers > 1


def test_attention_is_fused_as_in_upstreams_example(pipeline: GaudiPipeline) -> None:
    """Its text_to_image_generation.py sets the processor by hand."""
    by_hand = load(job(gaudi={"fused_attention": False}))
    assert attentions(by_hand, WIDE) == 0
    by_hand.forget(WIDE.graph_key)
    unet = by_hand._pipeline.unet
    unet.set_default_attn_processor(unet)
    assert attentions(by_hand, WIDE) == attentions(pipeline, WIDE)
    assert np.array_equal(by_hand.generate(WIDE, ITEMS).images, pipeline.generate(WIDE, ITEMS).images)


def test_fused_attention_changes_images_by_less_than_can_be_seen(plain: CpuPipeline) -> None:
    """A run that began without it stays without it all the same: its bytes differ on a card."""
    for fields, distance in (({}, 1e-5), ({"dtype": "bfloat16"}, 0.05)):
        made = [
            load(job(gaudi={"fused_attention": fused}, **fields)).generate(SQUARE, ITEMS).images
            for fused in (True, False)
        ]
        assert np.abs(made[0] - made[1]).max() <= distance


def test_a_graph_key_is_captured_once_until_it_is_forgotten(pipeline: GaudiPipeline) -> None:
    for bucket in (SQUARE, WIDE):
        pipeline.generate(bucket, ITEMS)
    captures, memory = counters.captures, counters.memory_in_use
    for bucket in (SQUARE, WIDE, SQUARE._replace(steps=5), SQUARE._replace(guidance_scale=3.0)):
        pipeline.generate(bucket, ITEMS)
    assert counters.captures == captures
    pipeline.forget(WIDE.graph_key)
    assert counters.memory_in_use < memory
    pipeline.generate(SQUARE, ITEMS)
    assert counters.captures == captures
    pipeline.generate(WIDE, ITEMS)
    assert counters.captures == captures + 1


@pytest.mark.parametrize("fields", [{"dtype": None}, {"dtype": "bfloat16"}])
def test_reduced_precision_gives_nearly_the_same_images(plain: CpuPipeline, fields: dict[str, Any]) -> None:
    ours = load(job(**fields)).generate(SQUARE, ITEMS).images
    assert 0 < np.abs(ours - plain.generate(SQUARE, ITEMS).images).mean() < 0.03


def test_the_safety_checkers_word_is_kept(tmp_path: Path, plain: CpuPipeline) -> None:
    checked = load(job(with_safety_checker(tmp_path / "checked"))).generate(SQUARE, ITEMS)
    assert checked.nsfw == [True] * 3
    assert not checked.images.any()
    same = CpuPipeline(describe_model(job(tmp_path / "checked", device="cpu")), 1, "float32").generate(SQUARE, ITEMS)
    assert same.nsfw == checked.nsfw


def with_safety_checker(directory: Path) -> Path:
    """The built-in model with a tiny checker that finds everything objectionable."""
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    shutil.copytree(BUILTIN_MODELS / "shapes", directory)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=tiny, vision_config=tiny | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)
    pipeline = StableDiffusionPipeline.from_pretrained(
        directory,
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        requires_safety_checker=True,
    )
    pipeline.save_pretrained(directory)
    return directory


def test_a_node_that_has_the_recipes_of_another_captures_and_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, made = Storage(str(tmp_path / "out")), []
    for node, compiled, loaded in (("first", 1, 0), ("second", 0, 1)):
        monkeypatch.setenv("PT_HPU_RECIPE_CACHE_CONFIG", f"{tmp_path / node},false,1024")
        config = job(gaudi={"recipe_cache": str(tmp_path / node)})
        pipeline = load(config)
        keeper = RecipeKeeper(recipes_of(config, store, pipeline.stack))
        assert keeper.bring() is None
        before = counters.captures, counters.compilations, counters.recipes_loaded
        made.append(pipeline.generate(SQUARE, ITEMS).images)
        after = counters.captures, counters.compilations, counters.recipes_loaded
        assert [count - first for count, first in zip(after, before, strict=True)] == [1, compiled, loaded]
        keeper.keep()
    assert np.array_equal(*made)


def test_memory_that_runs_out_is_the_devices_fault_and_names_a_smaller_batch(
    pipeline: GaudiPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise faults.out_of_memory(2**30)

    with monkeypatch.context() as patch:
        patch.setattr(faults, "check_launch", fail)
        with pytest.raises(
            DeviceError,
            match=r"at batch size 3 \(64x64, 3 steps, guidance 7.5\); try --batch-size 1",
        ):
            pipeline.generate(SQUARE, ITEMS)
    assert pipeline.generate(SQUARE, ITEMS).images.any()


def test_versions_that_were_not_validated_are_noted(pipeline: GaudiPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipeline.device == "hpu GAUDI2 (emulated)"
    assert pipeline.notes() == []
    import optimum.habana.utils
    from packaging.version import Version

    monkeypatch.setattr(optimum.habana.utils, "get_driver_version", lambda: Version("1.21.3"))
    (note,) = pipeline.notes()
    assert "validated with version 1.24.0" in note
    assert "the Gaudi driver here is 1.21.3" in note
