"""What an output format does for one attempt at a shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gaudi_batch.output.manifest import StoredImage


class Attempt(NamedTuple):
    """An attempt at a shard."""

    shard: int
    token: str


class OutputFormat(Protocol):
    """Where one attempt at a shard stores its images."""

    def add(self, row: int, image: int, pixels: npt.NDArray[np.uint8]) -> StoredImage:
        """Encodes one image and stores it, or keeps it until `finish`; may be called from several threads.

        Args:
            row: its row, counted over all files.
            image: its number within the row.
            pixels: height x width x 3, RGB.

        Raises:
            StorageError: it can't be stored.
        """

    def drop(self, stored: StoredImage) -> None:
        """Removes an image whose row failed later. Raises StorageError."""

    def finish(self, table: pa.Table) -> str:
        """Stores what is kept, once all images have been added.

        Args:
            table: the rows of the shard's manifest.

        Returns:
            The SHA-256 of the object that has all images; "" if each is an object, or there is none.

        Raises:
            StorageError: it can't be stored.
        """

    def close(self) -> None:
        """Gives up what is kept and not stored."""


class WriteObject(Protocol):
    """Writes an object of many images; the same arguments give the same bytes."""

    def __call__(
        self, file: BinaryIO, described: pa.Table, names: Sequence[str], images: Iterable[bytes | None]
    ) -> None:
        """Writes the images and what describes them.

        Args:
            file: to write to.
            described: a row for each image.
            names: file name of each image, by which it is known in the object.
            images: an image file each; None where the row has none.
        """
        ...
