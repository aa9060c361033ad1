"""Device memory: bytes of the tensors that live in it, against the size of a module's memory."""

from __future__ import annotations

import threading
import weakref

import torch

from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.faults import out_of_memory
from habana_frameworks._emulation.settings import settings

_living: dict[int, weakref.ref[torch.Tensor]] = {}
_changing = threading.RLock()


def take(host: torch.Tensor) -> None:
    """Counts a tensor's bytes as in use until it is gone.

    Raises:
        RuntimeError: the module has not so much left, in the words of the real stack.
    """
    if id(host) in _living or host.layout != torch.strided:
        return
    size = host.untyped_storage().nbytes()
    if counters.memory_in_use + size > settings().memory:
        raise out_of_memory(size)
    identity = id(host)

    def gone(_: object) -> None:
        with _changing:
            counters.memory_in_use -= size
            _living.pop(identity, None)

    with _changing:
        _living[identity] = weakref.ref(host, gone)
        counters.memory_in_use += size
        counters.memory_peak = max(counters.memory_peak, counters.memory_in_use)
