"""Injected faults: a device that refuses, runs out of memory or hangs on demand."""

from __future__ import annotations

import fcntl
import os
import time

from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.settings import Fault, settings


def acquire_is_refused(module: int) -> bool:
    """Whether a fault keeps a module from being acquired now."""
    return any(fault.kind == "acquire" and _fires(fault, module) for fault in settings().faults)


def check_launch() -> None:
    """What a launch may meet; to be called once it has been counted."""
    for fault in settings().faults:
        if fault.kind == "acquire" or counters.launches < fault.launch or not _fires(fault, counters.module):
            continue
        if fault.kind == "oom":
            raise out_of_memory(settings().memory)
        while True:
            time.sleep(60)


def out_of_memory(size: int) -> RuntimeError:
    """The error of the real stack for an allocation of `size` bytes that can't be had."""
    return RuntimeError(
        f"[Rank:0] FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed for size::{size} ({size / 1024**2:g})MB"
    )


def _fires(fault: Fault, module: int | None) -> bool:
    if fault.module is not None and fault.module != module:
        return False
    directory = settings().state / "faults"
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / fault.text, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_size >= fault.times:
            return False
        os.write(descriptor, b".")
        return True
    finally:
        os.close(descriptor)
