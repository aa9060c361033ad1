"""Random numbers of the device: generators of the host that carry the device's name."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

_plain_generator = torch.Generator


class _GeneratorType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _plain_generator)

    def __call__(cls, device: Any = None) -> Any:
        if device is not None and torch.device(device).type == "hpu":
            from habana_frameworks._emulation import modules

            modules.acquire()
            return HpuGenerator()
        return _plain_generator() if device is None else _plain_generator(device)


_addresses: set[int] = set()


class HpuGenerator(_plain_generator):  # type: ignore[misc, valid-type]
    """A generator of hpu:0."""

    device = property(lambda self: torch.device("hpu", 0))

    def __init__(self) -> None:
        _addresses.add(self._cdata)
        weakref.finalize(self, _addresses.discard, self._cdata)


def is_of_device(generator: Any) -> bool:
    """Whether it is an HpuGenerator: on its way through C++ one loses its Python class, not its address."""
    return generator._cdata in _addresses


class Generator(metaclass=_GeneratorType):
    """What `torch.Generator` is while the emulator is in force: knows device hpu."""


_default: HpuGenerator | None = None


def default_generator() -> HpuGenerator:
    """The device's own generator, which draws when an operation is given none."""
    global _default
    if _default is None:
        _default = HpuGenerator()
    return _default


def drawing_from_default(call: Callable[[], Any]) -> Any:
    """Runs an operation that can be given no generator, on the device's stream of numbers."""
    generator = default_generator()
    mine = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        return call()
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(mine)
