"""How the bridge runs."""

from __future__ import annotations

from habana_frameworks.torch.core import is_lazy

__all__ = ["is_lazy"]
