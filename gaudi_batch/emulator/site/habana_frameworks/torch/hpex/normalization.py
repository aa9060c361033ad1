"""Fused normalisation."""

from __future__ import annotations

from typing import Any

import torch

from habana_frameworks._emulation.absent import absent_class

FusedClipNorm = absent_class("habana_frameworks.torch.hpex.normalization.FusedClipNorm")


class FusedRMSNorm:
    """Division by the root of the mean square, times a weight."""

    @staticmethod
    def apply(data: torch.Tensor, gamma: torch.Tensor, epsilon: float, *_: Any) -> torch.Tensor:
        """Normalises the last dimension, computing in float32; the result has the type of `data`."""
        wide = data.to(torch.float32)
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return (normal * gamma.to(torch.float32)).to(data.dtype)
