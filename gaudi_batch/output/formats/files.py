"""Format `files`: one object an image, under a name made of numbers alone."""

from __future__ import annotations

import hashlib
import time
from datetime import datetime, timezone

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gaudi_batch.config.sections import EncodingConfig
from gaudi_batch.layout import image_path
from gaudi_batch.output.formats.base import Attempt
from gaudi_batch.output.formats.encoding import SUFFIXES, encode
from gaudi_batch.output.manifest import StoredImage
from gaudi_batch.storage.store import Storage


class FilesOutput:
    """Where one attempt at a shard stores its images.

    Args:
        storage: the job's output.
        encoding: how an image becomes bytes.
        attempt: the attempt.
    """

    def __init__(self, storage: Storage, encoding: EncodingConfig, attempt: Attempt) -> None:
        self._storage = storage
        self._encoding = encoding
        self._attempt = attempt

    def add(self, row: int, image: int, pixels: npt.NDArray[np.uint8]) -> StoredImage:
        """Encodes and stores one image; may be called from several threads. Raises StorageError."""
        started = time.monotonic()
        data = encode(pixels, self._encoding)
        encoded = time.monotonic()
        path = image_path(*self._attempt, row, image, SUFFIXES[self._encoding.type])
        self._storage.put(path, data)
        return StoredImage(
            path,
            hashlib.sha256(data).hexdigest(),
            datetime.now(timezone.utc),
            encoded - started,
            time.monotonic() - encoded,
        )

    def drop(self, stored: StoredImage) -> None:
        """Removes an image whose row failed later. Raises StorageError."""
        self._storage.remove(stored.path)

    def finish(self, table: pa.Table) -> str:
        """Stores nothing more."""
        return ""

    def close(self) -> None:
        """Keeps nothing."""
