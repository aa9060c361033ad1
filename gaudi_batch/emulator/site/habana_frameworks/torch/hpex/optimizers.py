"""Fused optimizers: the emulator is for inference."""

from __future__ import annotations

from habana_frameworks._emulation.absent import absent_class

FusedAdamW = absent_class("habana_frameworks.torch.hpex.optimizers.FusedAdamW")
