"""Formats that keep all images of a shard in one object, which is stored when the shard is made.

Images come in any order from several threads. Until all are there they are kept encoded: in memory while they are few,
then in a temporary file.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.config.sections import EncodingConfig
from gaudi_batch.layout import data_path, image_name
from gaudi_batch.output import manifest
from gaudi_batch.output.formats.base import Attempt, WriteObject
from gaudi_batch.output.formats.encoding import SUFFIXES, encode
from gaudi_batch.output.manifest import StoredImage
from gaudi_batch.storage.scratch import scratch_directory, scratch_errors, sha256_of
from gaudi_batch.storage.store import Storage

SPOOL_BYTES = 32 << 20
"""Encoded images that are kept in memory; more go to a temporary file. A few dozen images of a megapixel."""


class WholeOutput:
    """Where one attempt at a shard stores its images.

    Args:
        storage: the job's output.
        encoding: how an image becomes bytes.
        attempt: the attempt.
        suffix: what the object's name ends with.
        write: writes the object.
    """

    def __init__(
        self, storage: Storage, encoding: EncodingConfig, attempt: Attempt, suffix: str, write: WriteObject
    ) -> None:
        self._storage, self._encoding, self._write = storage, encoding, write
        self._path = data_path(*attempt, suffix)
        self._lock = threading.Lock()
        self._ended = False
        self._kept: dict[str, tuple[int, int]] = {}  # start and size by name
        self._spool: tempfile.SpooledTemporaryFile[bytes] | None = None

    def add(self, row: int, image: int, pixels: npt.NDArray[np.uint8]) -> StoredImage:
        """Encodes one image and keeps it; may be called from several threads. Raises StorageError."""
        started = time.monotonic()
        data = encode(pixels, self._encoding)
        encode_s = time.monotonic() - started
        name = image_name(row, image, SUFFIXES[self._encoding.type])
        with self._lock, scratch_errors("keep images until their shard is whole"):
            spool = self._opened()
            start = spool.seek(0, os.SEEK_END)
            spool.write(data)
            self._kept[name] = (start, len(data))
        digest = hashlib.sha256(data).hexdigest()
        return StoredImage(self._path, digest, datetime.now(timezone.utc), encode_s, 0.0, name)

    def drop(self, stored: StoredImage) -> None:
        """Leaves an image out whose row failed later."""
        assert stored.member is not None
        with self._lock:
            del self._kept[stored.member]

    def finish(self, table: pa.Table) -> str:
        """Stores the object; see `OutputFormat.finish`. Raises StorageError."""
        images = table.filter(pc.is_valid(table.column("path")))
        if not len(images):
            return ""
        names = images.column(manifest.MEMBER).to_pylist()
        with (
            scratch_directory("write the images of a shard") as directory,
            scratch_errors("write the images of a shard"),
        ):
            path = f"{directory}/object"
            with Path(path).open("wb") as file:
                self._write(file, manifest.described(images, has_members=True), names, map(self._bytes_of, names))
            self.close()
            digest = sha256_of(path)
            self._storage.put_file(self._path, path)
        return digest

    def close(self) -> None:
        """Gives up what is kept."""
        with self._lock:
            self._ended = True
            if self._spool is not None:
                self._spool.close()

    def _bytes_of(self, name: str) -> bytes:
        with self._lock:
            start, size = self._kept[name]
            spool = self._opened()
            spool.seek(start)
            return spool.read(size)

    def _opened(self) -> tempfile.SpooledTemporaryFile[bytes]:
        if self._ended:
            raise ValueError("the attempt has ended")
        if self._spool is None:
            self._spool = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115, as `close` ends it
        return self._spool
