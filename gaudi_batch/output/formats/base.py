"""What an output format does for one attempt at a shard."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from gaudi_batch.output.manifest import StoredImage


class OutputFormat(Protocol):
    """Where one attempt at a shard stores its images."""

    def add(self, row: int, image: int, pixels: npt.NDArray[np.uint8]) -> StoredImage:
        """Encodes and stores one image; may be called from several threads.

        Args:
            row: its row, counted over all files.
            image: its number within the row.
            pixels: height x width x 3, RGB.

        Raises:
            StorageError: it can't be stored.
        """

    def drop(self, stored: StoredImage) -> None:
        """Removes an image whose row failed later. Raises StorageError."""
