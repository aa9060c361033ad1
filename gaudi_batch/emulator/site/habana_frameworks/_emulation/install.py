"""Makes PyTorch know device hpu, in every thread: kernels for its factories, and the functions that name a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map

from habana_frameworks._emulation.generator import Generator
from habana_frameworks._emulation.tensor import HpuTensor, on_device, to_device, to_host

_libraries: list[torch.library.Library] = []


def install(device_module: Any) -> None:
    """Registers `torch.hpu` and everything that maps its device to the host. Acquires nothing."""
    if _libraries:
        return
    torch._register_device_module("hpu", device_module)
    _register_factories()
    _patch_moves()
    _patch_autocast()
    torch.Generator = Generator  # type: ignore[misc]


def _register_factories() -> None:
    aten = torch.library.Library("aten", "IMPL", "HPU")
    _libraries.append(aten)

    def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> HpuTensor:
        options = {} if memory_format is None else {"memory_format": memory_format}
        return on_device(torch.empty(size, dtype=dtype, device="cpu", **options))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> HpuTensor:
        return on_device(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    aten.impl("empty.memory_format", empty)
    aten.impl("empty_strided", empty_strided)


def _names_hpu(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("hpu")) or (
        isinstance(device, torch.device) and device.type == "hpu"
    )


def _patch_moves() -> None:
    plain_to = torch.Tensor.to

    @functools.wraps(plain_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        mine = isinstance(self, HpuTensor)
        other = kwargs.pop("other", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        if other is not None:
            args = (other.device, other.dtype, *args[1:])
        if not mine and not any(map(_names_hpu, args)) and not _names_hpu(kwargs.get("device")):
            return plain_to(self, *args, **kwargs)
        copy = kwargs.pop("copy", len(args) > 3 and args[3])
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args[:3], **kwargs)
        if not mine:
            return to_device(self, dtype, memory_format)
        if device is not None and device.type == "cpu":
            return to_host(self, dtype, memory_format)
        rest = {"dtype": dtype or self.dtype, "copy": copy}
        if memory_format is not None:
            rest["memory_format"] = memory_format
        if device is not None and device.type == "meta":
            rest["device"] = device
        with torch._C.DisableTorchFunctionSubclass():
            return plain_to(self, **rest)

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.Tensor.hpu = lambda self, *_, **__: self.to("hpu")  # type: ignore[attr-defined]
    plain_cpu = torch.Tensor.cpu

    @functools.wraps(plain_cpu)
    def cpu(self: torch.Tensor, memory_format: Any = None) -> torch.Tensor:
        if isinstance(self, HpuTensor):
            return to_host(self, memory_format=memory_format)
        return plain_cpu(self) if memory_format is None else plain_cpu(self, memory_format=memory_format)

    torch.Tensor.cpu = cpu  # type: ignore[method-assign, assignment]
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _with_device(getattr(torch, name)))


def _with_device(plain: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that take data of any kind and the device where it shall be."""

    @functools.wraps(plain)
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if isinstance(data, HpuTensor):
            moved = data.to(device or data.device, copy=plain.__name__ == "tensor")
            return moved if kwargs.get("dtype") is None else moved.to(kwargs["dtype"])
        if isinstance(data, (list, tuple)):  # of numbers of the device, which are read
            data = tree_map(lambda value: to_host(value) if isinstance(value, HpuTensor) else value, data)
        device = _device_of_context() if device is None else device
        if _names_hpu(device):
            return to_device(plain(data, *args, device="cpu", **kwargs))
        return plain(data, *args, device=device, **kwargs)

    return make


def _device_of_context() -> Any:
    """The device of the innermost `with torch.device(...)`."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), None)


def _patch_autocast() -> None:
    """Autocast on hpu is autocast on the host, whose lists of operations PyTorch has."""
    plain_init = torch.autocast.__init__

    @functools.wraps(plain_init)
    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        plain_init(self, "cpu" if device_type == "hpu" else device_type, *args, **kwargs)

    torch.autocast.__init__ = init  # type: ignore[method-assign]
    for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
        setattr(torch, name, _for_cpu(getattr(torch, name)))


def _for_cpu(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any) -> Any:
        return plain(*("cpu" if argument == "hpu" else argument for argument in args))

    return call
