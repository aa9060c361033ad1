"""Fused attention and rotary embeddings."""

from __future__ import annotations

from enum import Enum

import torch

from habana_frameworks._emulation.absent import absent_class
from habana_frameworks._emulation.counters import counters

CTCLoss = absent_class("habana_frameworks.torch.hpex.kernels.CTCLoss")


class FusedSDPA:
    """Scaled dot-product attention."""

    @staticmethod
    def apply(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        softmax_mode: str | None = "None",
        recompute: bool | None = None,
        valid_sequence_lengths: torch.Tensor | None = None,
        padding_side: str = "left",
    ) -> torch.Tensor:
        """Attention of (batch, heads, length, width); heads of key and value may be fewer, each serving several."""
        if valid_sequence_lengths is not None:
            raise NotImplementedError("FusedSDPA.apply(valid_sequence_lengths=...) is not emulated")
        made: torch.Tensor = torch.ops.hpu.fused_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        return made


class RotaryPosEmbeddingMode(Enum):
    """Which elements are rotated together: halves of the width, or neighbours."""

    BLOCKWISE = 0
    PAIRWISE = 1


def apply_rotary_pos_emb(
    p: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    offset: int = 0,
    mode: RotaryPosEmbeddingMode = RotaryPosEmbeddingMode.BLOCKWISE,
) -> torch.Tensor:
    """Rotates pairs of elements of `p` by the angles of `cos` and `sin`, which broadcast to it.

    The result has the type of `p`, whatever that of the angles: attention takes it together with values of that type.
    """
    if offset:
        raise NotImplementedError("apply_rotary_pos_emb(offset=...) is not emulated")
    if position_ids is not None:
        cos, sin = (table.squeeze()[position_ids].unsqueeze(1) for table in (cos, sin))
    if mode is RotaryPosEmbeddingMode.PAIRWISE:
        rotated = torch.stack((-p[..., 1::2], p[..., 0::2]), dim=-1).flatten(-2)
    else:
        left, right = p.chunk(2, dim=-1)
        rotated = torch.cat((-right, left), dim=-1)
    return (p * cos + rotated * sin).to(p.dtype)


class RotaryPosEmbeddingHelperV1:
    """Rotates halves of the width; cos and sin as they are."""

    @staticmethod
    def apply(p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """As `apply_rotary_pos_emb`."""
        return apply_rotary_pos_emb(p, cos, sin, None, offset)


class RotaryPosEmbeddingHelperV2:
    """Rotates halves of the width; cos and sin are tables that `position_ids` looks up."""

    @staticmethod
    def apply(
        p: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `apply_rotary_pos_emb`."""
        return apply_rotary_pos_emb(p, cos, sin, position_ids)


RotaryPosEmbeddingHelperV3 = RotaryPosEmbeddingHelperV2

_operators = torch.library.Library("hpu", "DEF")
_operators.define(
    "fused_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float dropout, bool causal, float? scale)"
    " -> Tensor"
)
_operators.define(
    "rotary_pos_embedding(Tensor input, Tensor sin, Tensor cos, Tensor? position_ids, int offset, int mode) -> Tensor"
)


def _rotary_pos_embedding(
    p: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, position_ids: torch.Tensor | None, offset: int, mode: int
) -> torch.Tensor:
    return apply_rotary_pos_emb(p, cos, sin, position_ids, offset, RotaryPosEmbeddingMode(mode))


_operators.impl("rotary_pos_embedding", _rotary_pos_embedding, "CompositeImplicitAutograd")


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    counters.count("fused_attentions")
    shared = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=shared
    )


# One operation, as on the device: a graph that is replayed computes it again, and it is counted again.
_operators.impl("fused_attention", _fused_attention, "CompositeExplicitAutograd")
