"""The device's own random numbers, apart from those of the host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from habana_frameworks._emulation.generator import default_generator


def get_rng_state(device: Any = "hpu") -> torch.Tensor:
    """State of the device's generator."""
    return default_generator().get_state()


def get_rng_state_all() -> list[torch.Tensor]:
    """States of the generators of all devices of this process, of which there is one."""
    return [get_rng_state()]


def set_rng_state(new_state: torch.Tensor, device: Any = "hpu") -> None:
    """Sets the state of the device's generator."""
    default_generator().set_state(new_state)


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Sets the states of all generators."""
    for state in new_states:
        set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seeds the device's generator."""
    default_generator().manual_seed(int(seed))


manual_seed_all = manual_seed


def seed() -> None:
    """Seeds the device's generator at random."""
    default_generator().seed()


seed_all = seed


def initial_seed() -> int:
    """What the device's generator was seeded with."""
    return default_generator().initial_seed()
