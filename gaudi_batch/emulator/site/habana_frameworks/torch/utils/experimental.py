"""What kind of device it is."""

from __future__ import annotations

from enum import Enum

from habana_frameworks._emulation import modules
from habana_frameworks.torch import hpu

__all__ = ["hpu", "synDeviceType"]


class synDeviceType(Enum):
    """Kinds of device, in the spelling of the real stack."""

    synDeviceGaudi = 1
    synDeviceGaudi2 = 4
    synDeviceGaudi3 = 5


def _get_device_type() -> synDeviceType:
    """The kind of the device, which is acquired to ask it."""
    modules.acquire()
    return synDeviceType.synDeviceGaudi2
