"""Steps of lazy mode, and the settings of the bridge."""

from __future__ import annotations

import os
from typing import Any

from habana_frameworks._emulation import faults, modules
from habana_frameworks._emulation.absent import absent
from habana_frameworks._emulation.counters import counters
from habana_frameworks.torch import hpu

__all__ = [
    "hpu",
    "hpu_inference_initialize",
    "hpu_inference_set_env",
    "hpu_initialize",
    "hpu_reset_env",
    "hpu_set_env",
    "hpu_set_inference_env",
    "is_lazy",
    "iter_mark_step",
    "mark_step",
]


def mark_step(device_str: str = "", sync: bool = False) -> None:
    """Hands what has gathered to the device; here it was executed at once, so this is counted only."""
    counters.count("mark_steps")
    faults.check_launch()


iter_mark_step = mark_step


def is_lazy() -> bool:
    """Whether PT_HPU_LAZY_MODE asks for lazy mode, which is the default."""
    return os.environ.get("PT_HPU_LAZY_MODE", "1") != "0"


def hpu_set_env(*args: Any, **kwargs: Any) -> None:
    """Prepares quantised inference: nothing to prepare here."""


hpu_set_inference_env = hpu_inference_set_env = hpu_reset_env = hpu_set_env


def hpu_initialize(model: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Acquires the device; returns the model as it is."""
    modules.acquire()
    return model


hpu_inference_initialize = hpu_initialize
quantization = absent("habana_frameworks.torch.core.quantization")
