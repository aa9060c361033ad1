"""A Gaudi card as Intel's bridge has it, whatever makes the images: acquiring it, its name, its memory, its errors.

Nothing of Intel's stack is imported with this module.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from gaudi_batch.pipelines.base import DeviceError, DeviceMemory, OutOfDeviceMemory
from gaudi_batch.plan import Bucket

WARMUP_BATCHES = 3
"""First batches of a graph key that compile or may; optimum-habana leaves as many out of its own throughput
(`throughput_warmup_steps` in its pipelines)."""
ACQUIRE_TIMEOUT_S = 30.0
"""Seconds for which a card that is not free is tried again."""
OUT_OF_MEMORY = ("PT_DEVMEM", "Allocation failed for size", "out of memory")
"""Messages of Intel's bridge when device memory is exhausted."""
DEVICE_FAILURES = ("synStatus", "FATAL ERROR :: MODULE:", "Graph compile failed", "Device acquire failed")
"""Messages of Intel's bridge when the driver, the device or the graph compiler has failed."""


def acquire(hpu: Any) -> None:
    """Acquires the card that Ray pinned to this process; the process before this one may still hold it.

    Args:
        hpu: `habana_frameworks.torch.hpu`.

    Raises:
        RuntimeError: it can't be had; the message says what to do.
    """
    deadline = time.monotonic() + ACQUIRE_TIMEOUT_S
    while True:
        try:
            return hpu.init()  # type: ignore[no-any-return]
        except RuntimeError as error:
            module = os.environ.get("HABANA_VISIBLE_MODULES", "any")
            if "Invalid HABANA_VISIBLE_MODULES" in str(error):
                raise RuntimeError(
                    f"this node has no module {module}; start its Ray with HABANA_VISIBLE_MODULES naming those that"
                    f" hl-smi shows: {error}"
                ) from None
            if "acquire failed" not in str(error) or time.monotonic() > deadline:
                raise RuntimeError(
                    f"module {module} of this node can't be had; hl-smi shows which process holds it: {error}"
                ) from None
        time.sleep(1)


def describe_device(hpu: Any) -> str:
    """The name of the acquired card in records, and whether it is emulated."""
    emulated = " (emulated)" if getattr(importlib.import_module("habana_frameworks"), "EMULATED", False) else ""
    return f"hpu {hpu.get_device_name()}{emulated}"


def take_memory_peak(hpu: Any) -> DeviceMemory:
    """What tensors have taken of the card's memory since this was last called."""
    peak = hpu.max_memory_allocated()
    hpu.reset_peak_memory_stats()
    return DeviceMemory(int(peak), int(hpu.mem_get_info()[1]))


def explained(error: RuntimeError, bucket: Bucket | None, batch_size: int) -> RuntimeError:
    """An error of Intel's bridge as what it means; one that means nothing is returned as it is.

    Args:
        error: the error.
        bucket: of the batch, None while the model is loaded.
        batch_size: images of the batch.
    """
    message = " ".join(str(error).split())
    if bucket is None and any(mark in message for mark in OUT_OF_MEMORY):
        return OutOfDeviceMemory(f"the model does not fit into the device's memory; try --dtype bfloat16: {message}")
    if any(mark in message for mark in OUT_OF_MEMORY):
        smaller = (
            f"try --batch-size {batch_size // 2}"
            if batch_size > 1
            else "the batch size is 1 already; try smaller images, or --dtype bfloat16"
        )
        return OutOfDeviceMemory(f"out of device memory at batch size {batch_size} ({bucket}); {smaller}: {message}")
    if any(mark in message for mark in DEVICE_FAILURES):
        return DeviceError(f"the device failed: {message}")
    return error
