"""The arguments that a pipeline gets, which it must know by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gaudi_batch.pipelines.base import Item
from gaudi_batch.pipelines.families import FAMILIES, Family
from gaudi_batch.plan import Bucket

pytestmark = pytest.mark.torch

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
ITEMS = [Item(0, 0, "a", "", 1), Item(1, 0, "b", "blurry", 2)]
READER = SimpleNamespace(
    tokenizer=lambda text, **_: SimpleNamespace(input_ids=list(text)),
    tokenizer_max_length=1024,
    prompt_template_encode="{}",
    prompt_template_encode_start_idx=0,
    text_padding=SimpleNamespace(length=0),
)
"""What counts a token for each letter."""


@each_family
def test_a_negative_prompt_is_given_with_guidance_alone_and_never_where_none_is_taken(family: Family) -> None:
    from gaudi_batch.pipelines.calls import call_arguments

    for scale in (0.0, 1.0, 4.0):
        arguments = call_arguments(READER, family, Bucket(64, 96, 7, scale), ITEMS)
        assert family.guidance is not None
        assert arguments[family.guidance] == scale
        assert (arguments["width"], arguments["height"], arguments["num_inference_steps"]) == (64, 96, 7)
        expected = [family.negative, "blurry"] if scale > 1 else None
        assert arguments.get("negative_prompt", "none") == ("none" if family.negative is None else expected)


@each_family
def test_every_argument_is_one_of_the_pipeline_s_own(family: Family) -> None:
    """Optimum-habana passes over arguments that it does not know, as they go into `**kwargs`."""
    import inspect

    import diffusers

    from gaudi_batch.pipelines.calls import call_arguments

    parameters = inspect.signature(getattr(diffusers, family.pipeline_class).__call__).parameters
    given = call_arguments(READER, family, Bucket(64, 64, 2, 4.0), ITEMS).keys()
    assert given <= parameters.keys()
    assert family.other_prompts == tuple(name for name in ("prompt_2", "prompt_3") if name in parameters)
    assert not given & set(family.other_prompts)


class Silent:
    """A pipeline that takes anything."""

    config = SimpleNamespace()

    def set_progress_bar_config(self, **_: Any) -> None:
        """Nothing."""

    def __call__(self, prompt: list[str], generator: Any, width: int, height: int, **kwargs: Any) -> None:
        """Nothing."""


def test_a_pipeline_that_would_pass_over_an_argument_is_refused_by_name() -> None:
    from gaudi_batch.pipelines.calls import prepare_calls

    with pytest.raises(
        RuntimeError, match=r"Silent .* takes no guidance_scale, negative_prompt, num_images_per_prompt"
    ):
        prepare_calls(Silent(), FAMILIES[0])


def test_texts_are_padded_to_the_longer_of_two_where_both_are_read() -> None:
    from gaudi_batch.pipelines.calls import call_arguments, graph_key

    qwen = FAMILIES[-1]
    item = Item(0, 0, "a" * 100, "b" * 300, 1)
    for scale, length in ((4.0, 512), (1.0, 128)):
        bucket = Bucket(64, 96, 7, scale)
        assert graph_key(READER, qwen, bucket, item) == (64, 96, length)
        call_arguments(READER, qwen, bucket, [item])
        assert READER.text_padding.length == length
    assert graph_key(READER, qwen, bucket, item._replace(prompt="a" * 5000)) == (64, 96, 1024)
