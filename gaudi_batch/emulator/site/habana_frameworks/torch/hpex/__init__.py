"""Extensions of Gaudi: fused kernels, each computed by its plain definition."""

from __future__ import annotations

from habana_frameworks.torch.hpex import kernels, normalization

__all__ = ["kernels", "normalization"]
