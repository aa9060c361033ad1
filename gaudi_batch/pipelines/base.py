"""The protocol between a card and its pipeline, whatever the device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gaudi_batch.plan import Bucket


class DeviceError(RuntimeError):
    """The device failed, whatever rows it had; its process can't go on."""


class OutOfDeviceMemory(DeviceError):
    """The device had no memory left."""


class DeviceMemory(NamedTuple):
    """Memory of a device, in bytes."""

    peak: int
    """Used at most."""
    total: int
    """What the device has."""


class Item(NamedTuple):
    """One image to make."""

    row: int
    """The number of its prompt row."""
    image: int
    """Its number within the row, from 0."""
    prompt: str
    negative_prompt: str
    seed: int
    """The seed of its own generator, 0 .. 2^63 - 1."""


@dataclass(frozen=True)
class Generated:
    """The result of one pipeline call; each sequence has an entry for each item, in order."""

    images: npt.NDArray[np.float32]
    """Pixels, shape (batch, height, width, 3), 0 to 1; not finite where the model failed."""
    nsfw: list[bool | None]
    """Whether the safety checker objects; None if the model has none."""
    truncated: list[bool]
    """Whether the prompt was longer than the text encoder reads."""


class Pipeline(Protocol):
    """A warm text-to-image pipeline on one device. All calls come from the one thread that made it."""

    device: str
    """The name of its device in throughput lines."""
    stack: Mapping[str, str]
    """What shapes its images beside the job and the model, by name; see stack.py."""
    model: str
    """What it has loaded: the commit of a hub model, the SHA-256 of a directory's files."""
    threads: int | None
    """Threads of torch in this process; None without torch."""
    warmup_batches: int
    """The first batches of a graph key that rates leave out, since they compile."""

    def generate(self, bucket: Bucket, items: list[Item]) -> Generated:
        """Makes one image for each item. In a run, `items` always holds exactly the job's batch size.

        Raises:
            DeviceError: the device failed, so this process is to be replaced.
            Exception: whatever else the libraries raise; the card finds out what it was about.
        """

    def graph_key(self, bucket: Bucket, item: Item) -> Hashable:
        """What a graph is captured for: of a bucket's graph key as much as decides, and the number of tokens to which
        the item's texts are padded, if that differs. Items of one call must have the same."""

    def forget(self, key: Hashable) -> bool:
        """Drops everything that is compiled for a graph key. Returns whether that of all other keys has gone, too."""

    def take_memory_peak(self) -> DeviceMemory | None:
        """The device's memory since this was last called, or since loading; None where the device does not tell."""

    def notes(self) -> list[str]:
        """Remarks for a person on this process's device and versions, a line each."""
