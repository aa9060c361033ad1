"""How a pipeline of diffusers or optimum-habana is called, whatever the device: the arguments that its family takes,
and what has to be mended in it so that an image depends on its own row alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gaudi_batch.pipelines.base import Generated, Item
from gaudi_batch.pipelines.families import Family
from gaudi_batch.plan import Bucket


def prepare_calls(pipeline: Any, family: Family) -> None:
    """Mends a pipeline that was just loaded.

    Raises:
        RuntimeError: it does not take the family's arguments; a Gaudi pipeline would pass over them in silence.
    """
    pipeline.set_progress_bar_config(disable=True)
    parameters = inspect.signature(pipeline.__call__).parameters.values()
    if unknown := _named(family).keys() - {each.name for each in parameters if each.kind != each.VAR_KEYWORD}:
        raise RuntimeError(
            f"{type(pipeline).__name__} of this diffusers or optimum-habana takes no {', '.join(sorted(unknown))};"
            " install the versions that the constraints name"
        )
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None  # it depends on which packages a node has
    if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        _zero_missing_negatives(pipeline)
    if family.text_lengths:
        pipeline.text_padding = padding = TextPadding(family.text_lengths[-1])
        _pad_tokens(pipeline, padding)
        mask_text_padding(pipeline.transformer, padding)


def call_arguments(pipeline: Any, family: Family, bucket: Bucket, items: Sequence[Item]) -> dict[str, Any]:
    """The arguments of one call, with a generator on the host of its own for each image. The items have one graph key,
    and their texts are padded for it."""
    if family.text_lengths:
        pipeline.text_padding.length = _text_length(pipeline, family, bucket, items[0])
    values = {
        "prompt": [item.prompt for item in items],
        "generator": [torch.Generator("cpu").manual_seed(item.seed) for item in items],
        "width": bucket.width,
        "height": bucket.height,
        "num_inference_steps": bucket.steps,
    }
    if family.guidance is not None:
        values[family.guidance] = bucket.guidance_scale
    if family.negative is not None and bucket.guidance_scale > 1:
        values["negative_prompt"] = [item.negative_prompt or family.negative for item in items]
    return _named(family) | values


def collect(pipeline: Any, family: Family, output: Any, items: list[Item]) -> Generated:
    """The images of diffusers' output, with the truncation of prompts, which diffusers only logs."""
    flagged = getattr(output, "nsfw_content_detected", None)
    return Generated(
        images=np.asarray(output.images, dtype=np.float32),
        nsfw=[None] * len(items) if flagged is None else [bool(flag) for flag in flagged],
        truncated=[is_truncated(pipeline, family, item.prompt) for item in items],
    )


def is_truncated(pipeline: Any, family: Family, prompt: str) -> bool:
    """Whether the text encoder that reads most of a prompt does not read all of it."""
    tokenizer, most = getattr(pipeline, family.text.tokenizer, None), family.text.tokens
    if tokenizer is None:  # as in a Stable Diffusion 3 without its T5
        tokenizer, most = pipeline.tokenizer, None
    return bool(len(tokenizer(prompt, truncation=False).input_ids) > (most or tokenizer.model_max_length))


def graph_key(pipeline: Any, family: Family, bucket: Bucket, item: Item) -> tuple[int, ...]:
    """See `Pipeline`."""
    key = bucket.graph_key
    if family.text_lengths:
        return key.width, key.height, _text_length(pipeline, family, bucket, item)
    return (*key,) if family.doubles else (key.width, key.height)


def _named(family: Family) -> dict[str, Any]:
    """The arguments that are always the same, and None for those that are not."""
    changing = ["prompt", "generator", "width", "height", "num_inference_steps"]
    if family.guidance is not None:
        changing.append(family.guidance)
    if family.negative is not None:
        changing.append("negative_prompt")
    return dict.fromkeys(changing) | {"output_type": "np", **family.always, **family.arguments}


def _zero_missing_negatives(pipeline: Any) -> None:
    """Gives rows without a negative prompt the zeros that diffusers gives a call without any."""
    encode = pipeline.encode_prompt

    def encode_prompt(**arguments: Any) -> tuple[Any, ...]:
        embeds, negative, pooled, negative_pooled = encode(**arguments)
        texts = arguments.get("negative_prompt")
        if negative is not None and texts is not None:
            given = torch.tensor([bool(text) for text in texts], device=negative.device)
            negative = torch.where(given[:, None, None], negative, torch.zeros_like(negative))
            negative_pooled = torch.where(given[:, None], negative_pooled, torch.zeros_like(negative_pooled))
        return embeds, negative, pooled, negative_pooled

    pipeline.encode_prompt = encode_prompt


@dataclass
class TextPadding:
    """The number of tokens to which the texts of the next call are padded."""

    length: int


def _text_length(pipeline: Any, family: Family, bucket: Bucket, item: Item) -> int:
    """The number of tokens to which an item's prompt and, with guidance, its negative prompt are padded."""
    texts = [item.prompt, item.negative_prompt or family.negative or ""][: 2 if bucket.guidance_scale > 1 else 1]
    tokens = max(_tokens(pipeline, text) for text in texts)
    return next((length for length in family.text_lengths if length >= tokens), family.text_lengths[-1])


def _tokens(pipeline: Any, text: str) -> int:
    """Tokens of a text that the transformer sees, which are those after the template's beginning."""
    templated = pipeline.prompt_template_encode.format(text)
    dropped = int(pipeline.prompt_template_encode_start_idx)
    most = pipeline.tokenizer_max_length + dropped
    return len(pipeline.tokenizer(templated, max_length=most, truncation=True).input_ids) - dropped


def _pad_tokens(pipeline: Any, padding: TextPadding) -> None:
    """Has the text encoder read as many tokens for a text alone as beside a longer one: how many there are decides the
    last bits of its output."""
    tokenizer, dropped = pipeline.tokenizer, int(pipeline.prompt_template_encode_start_idx)
    plain: Callable[..., Any] = type(tokenizer).__call__

    def padded(self: Any, text: Any, **options: Any) -> Any:
        if options.get("padding") is True:
            options |= {"padding": "max_length", "max_length": padding.length + dropped}
        return plain(self, text, **options)

    tokenizer.__class__ = type(type(tokenizer).__name__, (type(tokenizer),), {"__call__": padded})


def mask_text_padding(transformer: Any, padding: TextPadding) -> None:
    """Pads each text to one of a few lengths, and has attention pass over the padding.

    The transformer itself attends to padding, so an image would depend on the longest prompt of its batch. With few
    lengths there are few graphs, too: the lengths of the texts are part of a graph's key.

    What goes into a graph and comes out of it is copied. Both calls of a guided step may have the same key and so the
    same buffers: without the copies the second call writes over the first one's text and result.
    """
    forward = transformer.forward

    def masked_forward(
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
        txt_seq_lens: Sequence[int],
        attention_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, ...]:
        batch, tokens = encoder_hidden_states.shape[:2]
        length = padding.length
        text = torch.nn.functional.pad(encoder_hidden_states, (0, 0, 0, length - tokens))
        is_text = torch.nn.functional.pad(encoder_hidden_states_mask, (0, length - tokens)).bool()
        is_image = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=is_text.device)
        attention_mask = torch.cat([is_text, is_image], 1)[:, None, None]
        made = forward(
            hidden_states=hidden_states.clone(),
            encoder_hidden_states=text.clone(),
            encoder_hidden_states_mask=is_text,
            txt_seq_lens=[length] * batch,
            attention_kwargs={**(attention_kwargs or {}), "attention_mask": attention_mask},
            **{name: value.clone() if torch.is_tensor(value) else value for name, value in others.items()},
        )
        return tuple(each.clone() for each in made)

    transformer.forward = masked_forward
