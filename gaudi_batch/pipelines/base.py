"""What a card asks of a pipeline, whatever the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gaudi_batch.plan import Bucket, GraphKey


class DeviceError(RuntimeError):
    """The device has failed, whatever rows it was given; its process can't go on."""


class Item(NamedTuple):
    """One image to make."""

    row: int
    """The prompt row that it belongs to."""
    image: int
    """Its number within the row, from 0."""
    prompt: str
    negative_prompt: str
    seed: int
    """Of its own generator, 0 .. 2^63 - 1."""


@dataclass(frozen=True)
class Generated:
    """What one pipeline call returns; each sequence has one entry an item, in order."""

    images: npt.NDArray[np.float32]
    """Pixels, shape (batch, height, width, 3), 0 to 1; not finite where the model failed."""
    nsfw: list[bool | None]
    """Whether the safety checker objects; None where the model has none."""
    truncated: list[bool]
    """Whether the prompt was longer than the text encoder reads."""


class Pipeline(Protocol):
    """A warm text-to-image pipeline on one device. All calls come from the one thread that made it."""

    device: str
    """What it runs on, as the throughput lines name it."""
    stack: Mapping[str, str]
    """What shapes its images beside the job and the model, by name; see stack.py."""
    model: str
    """What it has loaded: the commit of a hub model, the SHA-256 of a directory's files."""
    threads: int | None
    """Of torch in this process, None where there is none."""
    warmup_batches: int
    """First batches of a graph key that are left out of rates, since they compile."""

    def generate(self, bucket: Bucket, items: list[Item]) -> Generated:
        """Makes one image for each item. `items` always holds exactly the job's batch size.

        Raises:
            DeviceError: the device failed, so this process is to be replaced.
            Exception: whatever else the libraries raise; the card finds out what it was about.
        """

    def forget(self, key: GraphKey) -> None:
        """Drops what has been compiled for a graph key."""

    def notes(self) -> list[str]:
        """What a person should know of this process's device and versions, a line each."""
