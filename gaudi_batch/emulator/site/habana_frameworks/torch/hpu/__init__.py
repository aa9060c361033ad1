"""The device: how many there are, which one this process holds, streams, graphs, memory and random numbers. Graphs are
there in lazy mode alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch as pytorch

from habana_frameworks._emulation import install, modules
from habana_frameworks._emulation.absent import absent, absent_class
from habana_frameworks._emulation.settings import is_lazy
from habana_frameworks.torch.hpu import memory, random, streams
from habana_frameworks.torch.hpu.memory import (
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    memory_summary,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
)
from habana_frameworks.torch.hpu.random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from habana_frameworks.torch.hpu.streams import Event, Stream, current_stream, default_stream, stream, synchronize

__all__ = [
    "Event",
    "Stream",
    "current_stream",
    "default_stream",
    "get_rng_state",
    "get_rng_state_all",
    "initial_seed",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "random",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "set_rng_state",
    "set_rng_state_all",
    "stream",
    "streams",
    "synchronize",
]
if is_lazy():
    from habana_frameworks.torch.hpu import graphs
    from habana_frameworks.torch.hpu.graphs import HPUGraph, wrap_in_hpu_graph

    __all__ += ["HPUGraph", "graphs", "wrap_in_hpu_graph"]

DEVICE_NAME = "GAUDI2"


def is_available() -> bool:
    """Whether there is a visible device; acquires none."""
    return device_count() > 0


def device_count() -> int:
    """How many devices are visible; acquires none."""
    return len(modules.visible_modules())


def init() -> None:
    """Acquires a device for this process."""
    modules.acquire()


_lazy_init = init


def is_initialized() -> bool:
    """Whether this process has acquired a device."""
    return modules.held_module() is not None


def _is_in_bad_fork() -> bool:
    return modules.in_bad_fork()


def get_device_name(device: Any = None) -> str:
    """Name of the device, which is acquired to ask it."""
    modules.acquire()
    return DEVICE_NAME


def get_device_capability(device: Any = None) -> str:
    """Release of the stack that the device is run by."""
    from habana_frameworks._emulation.settings import SYNAPSE_VERSION

    modules.acquire()
    return SYNAPSE_VERSION


get_device_properties = absent("habana_frameworks.torch.hpu.get_device_properties")
make_graphed_callables = absent("habana_frameworks.torch.hpu.make_graphed_callables")
ModuleCacher = absent_class("habana_frameworks.torch.hpu.ModuleCacher")


def current_device() -> int:
    """Index of the device of this process, always 0."""
    modules.acquire()
    return 0


def set_device(device: Any) -> None:
    """Accepts the one device that a process has."""
    index = device if isinstance(device, int) else pytorch.device(device).index
    if index not in (None, -1, 0):
        raise NotImplementedError("habana_frameworks.torch.hpu.set_device: a process has device 0 only")


@contextlib.contextmanager
def device(device: Any) -> Iterator[None]:
    """Work on a device, of which a process has one."""
    set_device(device)
    yield


def empty_cache() -> None:
    """Gives unused memory back: the emulator keeps none."""


def is_bf16_supported() -> bool:
    """Every Gaudi has bfloat16."""
    return True


def get_amp_supported_dtype() -> list[Any]:
    """What autocast may compute in."""
    return [pytorch.bfloat16, pytorch.float16, pytorch.float32]


def is_autocast_hpu_enabled() -> bool:
    """Whether autocast is on."""
    return bool(pytorch.is_autocast_enabled("hpu"))


def get_autocast_hpu_dtype() -> Any:
    """What autocast computes in."""
    return pytorch.get_autocast_dtype("hpu")


def set_autocast_hpu_enabled(enabled: bool) -> None:
    """Switches autocast."""
    pytorch.set_autocast_enabled("hpu", enabled)


def set_autocast_hpu_dtype(dtype: Any) -> None:
    """Sets what autocast computes in."""
    pytorch.set_autocast_dtype("hpu", dtype)


def enable_dynamic_shape() -> None:
    """Shapes may change between steps: they always may here."""


disable_dynamic_shape = enable_dynamic_shape


@contextlib.contextmanager
def sdp_kernel(enable_recompute: bool = False, **_: Any) -> Iterator[None]:
    """Chooses how the fused attention computes, of which there is one way here."""
    yield


install.install(sys.modules[__name__])
