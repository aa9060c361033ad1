"""The product's own pipelines for each model family on emulated cards, beside the same on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
from habana_frameworks._emulation.counters import counters
from optimum.habana import GaudiConfig
from optimum.habana.diffusers import GaudiQwenImagePipeline, GaudiStableDiffusion3Pipeline

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import Item, Pipeline
from gaudi_batch.pipelines.cpu import CpuPipeline
from gaudi_batch.pipelines.gaudi import GaudiPipeline
from gaudi_batch.pipelines.sources import describe_model
from gaudi_batch.plan import Bucket

STEPS = 3
SIZES = ((64, 64), (64, 96), (96, 64), (32, 64))
LONG = "a blue triangle on a red background, drawn with a soft brush " * 3


class Tiny(NamedTuple):
    """A tiny model of a family, and what is to be expected of it."""

    build: Callable[[], Any]
    guided: float
    """A guidance scale that is heeded."""
    negatives: bool = True
    near: float = 0.0
    """How far images on emulated cards may be from those of diffusers in float32, of pixels from 0 to 1: not at all
    where upstream computes the same. Its Stable Diffusion 3 attends to the zeros that fill up texts, and its Qwen-Image
    rotates by cosines and sines in place of complex numbers, which rounds otherwise."""
    fused: bool = True
    """Whether its denoiser's attention can be fused."""
    shapes: int = len(SIZES)
    """Graphs for `SIZES`."""


FAMILIES = {
    "xl": Tiny(tiny.xl, 5.0),
    "sd3": Tiny(tiny.sd3, 7.0, near=0.5),
    "sd3 medium": Tiny(partial(tiny.sd3, dual=()), 7.0, near=0.5),
    "flux": Tiny(tiny.flux, 3.5, negatives=False, shapes=3),
    "schnell": Tiny(partial(tiny.flux, guidance=False), 0.0, negatives=False, shapes=3),
    "turbo": Tiny(partial(tiny.xl, spacing="trailing"), 5.0),
    "qwen": Tiny(tiny.qwen, 4.0, near=1e-4, fused=False),
}
each_family = pytest.mark.parametrize("name", ["xl", "sd3", "flux", "qwen"])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("models")
    return {name: tiny.save(family.build, directory / name) for name, family in FAMILIES.items()}


def load(model: Path, device: str, **fields: Any) -> Any:
    config = JobConfig(prompts="p", output="o", model=str(model), device=device, **{"dtype": "float32"} | fields)
    info = describe_model(config)
    return GaudiPipeline(config, info, 1) if device == "hpu" else CpuPipeline(info, 1, config.dtype or "float32")


@pytest.fixture(scope="module")
def cards(saved: dict[str, Path]) -> dict[str, GaudiPipeline]:
    return {name: load(model, "hpu") for name, model in saved.items()}


@pytest.fixture(scope="module")
def plain(saved: dict[str, Path]) -> dict[str, CpuPipeline]:
    return {name: load(model, "cpu") for name, model in saved.items()}


def bucket(name: str, guided: bool = True, size: tuple[int, int] = (64, 64), steps: int = STEPS) -> Bucket:
    return Bucket(*size, steps, FAMILIES[name].guided if guided else 1.0)


def items(name: str, count: int = 3) -> list[Item]:
    """Prompts of different length, one with a negative prompt where the family takes them."""
    texts = ["a red circle", "a large green square on a white background", LONG]
    negatives = ["", "blurry, cut off", ""] if FAMILIES[name].negatives else [""] * 3
    return [Item(row, 0, texts[row], negatives[row], row) for row in range(count)]


def images(pipeline: Pipeline, wanted: Bucket, made: list[Item]) -> dict[int, np.ndarray]:
    """As a card makes them: batches of 3 of items whose texts are padded alike, filled with the last."""
    alike: dict[Hashable, list[Item]] = {}
    for item in made:
        alike.setdefault(pipeline.graph_key(wanted, item), []).append(item)
    result: dict[int, np.ndarray] = {}
    for group in alike.values():
        filled = group + [group[-1]] * (3 - len(group))
        output = pipeline.generate(wanted, filled).images
        result |= {item.row: output[place] for place, item in enumerate(group)}
    return result


def equal(some: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> bool:
    return all(np.array_equal(some[row], others[row]) for row in others)


def distance(some: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> float:
    return max(float(np.abs(some[row] - others[row]).max()) for row in others)


@pytest.mark.parametrize(
    ("name", "guided", "size"),
    [
        *((name, True, SIZES[0]) for name in FAMILIES),
        *((name, False, SIZES[1]) for name in ("xl", "sd3", "flux", "qwen")),
        *(pytest.param(name, True, SIZES[2], marks=pytest.mark.thorough) for name in ("xl", "sd3", "flux", "qwen")),
    ],
)
def test_images_are_those_of_the_cpu(
    cards: dict[str, GaudiPipeline], plain: dict[str, CpuPipeline], name: str, guided: bool, size: tuple[int, int]
) -> None:
    wanted = bucket(name, guided, size)
    expected = images(plain[name], wanted, items(name))
    for _ in range(2):  # the first call captures
        made = images(cards[name], wanted, items(name))
        assert distance(made, expected) <= FAMILIES[name].near
        assert not name.startswith("sd3") or distance(made, expected) > 0.001


@each_family
def test_an_image_does_not_depend_on_the_rows_beside_it(
    cards: dict[str, GaudiPipeline], plain: dict[str, CpuPipeline], name: str
) -> None:
    for pipeline in (plain[name], cards[name]):
        together = images(pipeline, bucket(name), items(name))
        for item in items(name):
            assert equal(images(pipeline, bucket(name), [item]), {item.row: together[item.row]})


@each_family
def test_guidance_and_negative_prompts_are_heeded(cards: dict[str, GaudiPipeline], name: str) -> None:
    one = items(name)[:1]
    guided, unguided = (images(cards[name], bucket(name, guided), one) for guided in (True, False))
    assert distance(guided, unguided) > 0.001
    if FAMILIES[name].negatives:
        negative = [one[0]._replace(negative_prompt="a red circle, blurry")]
        assert distance(images(cards[name], bucket(name), negative), guided) > 0.001


@each_family
@pytest.mark.parametrize("graphs", [True, pytest.param(False, marks=pytest.mark.thorough)])
def test_every_attention_that_can_be_fused_is_fused(saved: dict[str, Path], name: str, graphs: bool) -> None:
    card = load(saved[name], "hpu", gaudi={"hpu_graphs": graphs})
    denoiser = getattr(card._pipeline, "unet", None) or card._pipeline.transformer
    in_all = sum(hasattr(part, "processor") for part in denoiser.modules())
    assert in_all > 1
    layers = in_all if FAMILIES[name].fused else 0
    for wanted in (bucket(name), bucket(name, steps=5), bucket(name)):
        before = int(counters.fused_attentions)
        card.generate(wanted, items(name)[:1] * 3)
        assert int(counters.fused_attentions) - before == layers * wanted.steps


@each_family
def test_four_shapes_in_any_order_are_captured_once(saved: dict[str, Path], name: str) -> None:
    card = load(saved[name], "hpu")
    before = counters.captures
    for number in (0, 1, 2, 3, 2, 0, 3, 1):
        card.generate(bucket(name, size=SIZES[number]), items(name)[:1] * 3)
    assert counters.captures - before == FAMILIES[name].shapes
    memory, captures = counters.memory_in_use, counters.captures
    key = card.graph_key(bucket(name), items(name)[0])
    assert card.forget(key) is not card._family.drops_single_graphs
    assert counters.memory_in_use < memory
    card.generate(bucket(name), items(name)[:1] * 3)
    assert counters.captures == captures + 1


def test_upstream_paints_the_negative_prompt_of_qwen_where_both_texts_have_one_length(
    saved: dict[str, Path], cards: dict[str, GaudiPipeline], plain: dict[str, CpuPipeline]
) -> None:
    """Both calls of a step then replay one graph, whose output is one buffer; the product's own copies it."""

    def upstream(graphs: bool, **texts: str | None) -> np.ndarray:
        pipeline = GaudiQwenImagePipeline.from_pretrained(
            saved["qwen"], use_habana=True, use_hpu_graphs=graphs, gaudi_config=GaudiConfig(), log_level=logging.ERROR
        )
        pipeline.set_progress_bar_config(disable=True)
        for _ in range(2):  # the first call captures
            made = pipeline(
                **{name: [text] for name, text in texts.items() if text is not None},
                generator=[torch.Generator("cpu").manual_seed(5)],
                true_cfg_scale=4.0,
                width=64,
                height=64,
                num_inference_steps=STEPS,
                batch_size=1,
                output_type="np",
            ).images
        image: np.ndarray = np.asarray(made)[0]
        return image

    right = upstream(False, prompt="a red circle", negative_prompt="a blue thing")
    wrong = upstream(True, prompt="a red circle", negative_prompt="a blue thing")
    assert np.abs(wrong - right).max() > 0.01
    assert np.abs(wrong - upstream(False, prompt="a blue thing")).max() < 1e-4
    one = [Item(0, 0, "a red circle", "a blue thing", 5)]
    for pipeline in (plain["qwen"], cards["qwen"]):
        assert np.abs(images(pipeline, bucket("qwen"), one)[0] - right).max() < 1e-4


def test_sd3_is_upstream_s_own_but_for_the_second_attention_s_last_bits(
    saved: dict[str, Path], cards: dict[str, GaudiPipeline]
) -> None:
    """Which attends to the zeros that fill up its texts, and so differs from diffusers."""
    upstream = GaudiStableDiffusion3Pipeline.from_pretrained(
        saved["sd3"], use_habana=True, use_hpu_graphs=True, gaudi_config=GaudiConfig(), log_level=logging.ERROR
    )
    upstream.set_progress_bar_config(disable=True)
    three = items("sd3")
    made = upstream(
        prompt=[item.prompt for item in three],
        negative_prompt=[item.negative_prompt for item in three],
        generator=[torch.Generator("cpu").manual_seed(item.seed) for item in three],
        guidance_scale=7.0,
        width=64,
        height=64,
        num_inference_steps=STEPS,
        batch_size=3,
        output_type="np",
    ).images
    ours = images(cards["sd3"], bucket("sd3"), three)
    assert max(float(np.abs(ours[row] - np.asarray(made[row])).max()) for row in ours) < 1e-5


def test_qwens_text_encoder_reads_as_many_tokens_for_a_short_text_as_for_a_long_one(
    cards: dict[str, GaudiPipeline],
) -> None:
    """How many there are decides the last bits of what it says of each."""
    pipeline = cards["qwen"]._pipeline
    pipeline.text_padding.length = 256
    for texts in (["a"], ["a", "b" * 90]):
        assert np.shape(pipeline.tokenizer(texts, max_length=2000, padding=True).input_ids)[1] == 256 + 34
