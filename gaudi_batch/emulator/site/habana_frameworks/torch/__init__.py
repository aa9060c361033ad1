"""Importing this makes PyTorch know device hpu; it acquires no device."""

from __future__ import annotations

from habana_frameworks.torch import core, hpex, hpu

__all__ = ["core", "hpex", "hpu"]
