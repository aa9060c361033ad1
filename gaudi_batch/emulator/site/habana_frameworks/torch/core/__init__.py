"""Steps of lazy mode, and the settings of the bridge."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from habana_frameworks._emulation import faults, modules
from habana_frameworks._emulation.absent import absent
from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.settings import is_lazy
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
    """Hands what has gathered to the device; here it was executed at once, so this is counted only. In eager mode
    nothing gathers."""
    if not is_lazy():
        _warn_of_eager_mode()
        return
    counters.count("mark_steps")
    faults.check_launch()


iter_mark_step = mark_step


@functools.cache
def _warn_of_eager_mode() -> None:
    warnings.warn("mark_step does nothing: PT_HPU_LAZY_MODE is not 1", stacklevel=3)


def hpu_set_env(*args: Any, **kwargs: Any) -> None:
    """Prepares quantised inference: nothing to prepare here."""


hpu_set_inference_env = hpu_inference_set_env = hpu_reset_env = hpu_set_env


def hpu_initialize(model: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Acquires the device; returns the model as it is."""
    modules.acquire()
    return model


hpu_inference_initialize = hpu_initialize
quantization = absent("habana_frameworks.torch.core.quantization")
