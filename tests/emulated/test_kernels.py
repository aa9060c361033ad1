"""Fused kernels: each computes what PyTorch's own functions do, in the calls that diffusers' pipelines make of them."""

from __future__ import annotations

from typing import Any

import habana_frameworks.torch as ht
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from habana_frameworks.torch.hpex.kernels import (
    FusedSDPA,
    RotaryPosEmbeddingHelperV1,
    RotaryPosEmbeddingHelperV2,
    RotaryPosEmbeddingMode,
    apply_rotary_pos_emb,
)
from habana_frameworks.torch.hpex.normalization import FusedRMSNorm

each_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def random(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator).to(dtype)


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Any = 0, scale: float = 8**-0.5
) -> torch.Tensor:
    """Attention, in float64."""
    scores = query.double() @ key.double().mT * scale + bias
    return torch.softmax(scores, -1) @ value.double()


@each_precision
@pytest.mark.parametrize("softmax", ["None", "fast"])
def test_attention(dtype: torch.dtype, softmax: str) -> None:
    query, key, value = (
        random(2, 3, 5, 8, dtype=dtype),
        random(2, 3, 7, 8, dtype=dtype),
        random(2, 3, 7, 8, dtype=dtype),
    )
    made = FusedSDPA.apply(query.to("hpu"), key.to("hpu"), value.to("hpu"), None, 0.0, False, None, softmax, None)
    assert (made.dtype, made.device.type) == (dtype, "hpu")
    assert torch.equal(made.cpu(), torch.nn.functional.scaled_dot_product_attention(query, key, value))
    torch.testing.assert_close(made.cpu(), written_out(query, key, value).to(dtype), atol=0.02, rtol=0.02)


@each_precision
def test_attention_with_masks_scales_and_heads_that_are_shared(dtype: torch.dtype) -> None:
    query, key, value = (
        random(2, 4, 5, 8, dtype=dtype),
        random(2, 4, 7, 8, dtype=dtype),
        random(2, 4, 7, 8, dtype=dtype),
    )
    allowed = random(2, 1, 5, 7) > -0.5
    allowed[..., 0] = True
    bias = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, -10000.0)
    earlier = torch.zeros(5, 7).masked_fill(torch.ones(5, 7).triu(1).bool(), -torch.inf)
    cases: list[tuple[dict[str, Any], torch.Tensor]] = [
        ({"attn_mask": allowed}, written_out(query, key, value, bias)),
        ({"attn_mask": bias.to(dtype)}, written_out(query, key, value, bias)),
        ({"is_causal": True}, written_out(query, key, value, earlier)),
        ({"scale": 0.1}, written_out(query, key, value, scale=0.1)),
        ({"attn_mask": allowed, "scale": 0.1}, written_out(query, key, value, bias, scale=0.1)),
    ]
    for options, expected in cases:
        on_device = {name: made.to("hpu") if torch.is_tensor(made) else made for name, made in options.items()}
        made = FusedSDPA.apply(query.to("hpu"), key.to("hpu"), value.to("hpu"), **on_device)
        torch.testing.assert_close(made.cpu(), expected.to(dtype), atol=0.02, rtol=0.02)
    few_key, few_value = key[:, :2], value[:, :2]
    made = FusedSDPA.apply(query.to("hpu"), few_key.to("hpu"), few_value.to("hpu"))
    repeated = (few.repeat_interleave(2, 1) for few in (few_key, few_value))
    torch.testing.assert_close(made.cpu(), written_out(query, *repeated).to(dtype), atol=0.02, rtol=0.02)


def test_attention_takes_one_type_and_says_what_it_has_not() -> None:
    whole, half = random(1, 1, 2, 8).to("hpu"), random(1, 1, 2, 8, dtype=torch.bfloat16).to("hpu")
    with pytest.raises(RuntimeError, match="same dtype"):
        FusedSDPA.apply(whole, whole, half)
    with pytest.raises(NotImplementedError, match="valid_sequence_lengths"):
        FusedSDPA.apply(whole, whole, whole, valid_sequence_lengths=torch.ones(1))
    with ht.hpu.sdp_kernel(enable_recompute=True):
        assert FusedSDPA.apply(half, half, half).dtype == torch.bfloat16


@each_precision
def test_rms_norm(dtype: torch.dtype) -> None:
    data, weight = random(2, 3, 5, 8, dtype=dtype), random(8, dtype=dtype)
    for data_there in (data, data.transpose(1, 2)):  # queries come in either layout
        made = FusedRMSNorm.apply(data_there.to("hpu"), weight.to("hpu"), 1e-6, False, 0, True)
        assert (made.dtype, made.device.type) == (dtype, "hpu")
        wide = data_there.double()
        root = (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(made.cpu(), (wide / root * weight.double()).to(dtype))
        torch.testing.assert_close(made.cpu(), torch.nn.functional.rms_norm(data_there, (8,), weight, 1e-6))
    assert FusedRMSNorm.apply(data.to("hpu"), weight.float().to("hpu"), 1e-6).dtype == dtype


@each_precision
def test_rotary_embedding_of_neighbours_is_that_of_diffusers(dtype: torch.dtype) -> None:
    data = random(2, 3, 5, 8, dtype=dtype)
    cos, sin = get_1d_rotary_pos_embed(8, 5, repeat_interleave_real=True, use_real=True)
    expected = apply_rotary_emb(data, (cos, sin))
    angles = (table[None, None].to("hpu") for table in (sin, cos))
    made = torch.ops.hpu.rotary_pos_embedding(data.to("hpu"), *angles, None, 0, 1)
    assert (made.dtype, made.device.type) == (dtype, "hpu")
    assert torch.equal(made.cpu(), expected)
    turned = torch.polar(torch.ones(5, 4), torch.atan2(sin, cos)[:, ::2])
    pairs = torch.view_as_complex(data.float().unflatten(-1, (4, 2)))
    torch.testing.assert_close(made.cpu(), torch.view_as_real(pairs * turned).flatten(-2).to(dtype))
    again = apply_rotary_pos_emb(data.to("hpu"), cos.to("hpu"), sin.to("hpu"), None, 0, RotaryPosEmbeddingMode.PAIRWISE)
    assert torch.equal(again.cpu(), expected)


@each_precision
def test_rotary_embedding_of_halves(dtype: torch.dtype) -> None:
    data, angle = random(2, 3, 5, 8, dtype=dtype), random(9, 4)
    cos, sin = (torch.cat([table, table], -1) for table in (angle.cos(), angle.sin()))
    positions = torch.tensor([[0, 1, 2, 3, 4], [8, 2, 2, 0, 5]])
    turned = torch.polar(torch.ones(2, 1, 5, 4), angle[positions].unsqueeze(1))
    pairs = torch.complex(data[..., :4].float(), data[..., 4:].float()) * turned
    expected = torch.cat([pairs.real, pairs.imag], -1).to(dtype)
    on_device = data.to("hpu"), cos[None, None].to("hpu"), sin[None, None].to("hpu"), positions.to("hpu")
    made = RotaryPosEmbeddingHelperV2.apply(*on_device)
    assert made.dtype == dtype
    torch.testing.assert_close(made.cpu(), expected)
    looked_up = (table[positions].unsqueeze(1).to("hpu") for table in (cos, sin))
    torch.testing.assert_close(RotaryPosEmbeddingHelperV1.apply(data.to("hpu"), *looked_up).cpu(), expected)
    with pytest.raises(NotImplementedError, match="offset"):
        RotaryPosEmbeddingHelperV1.apply(data.to("hpu"), cos[:5].to("hpu"), sin[:5].to("hpu"), 2)
