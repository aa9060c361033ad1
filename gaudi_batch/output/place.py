"""Checks the place of an output before a run is there: no file in its way, and permission to write."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.storage.store import Storage
from gaudi_batch.storage.waits import told_if_slow

PREFIX = ".gaudi-batch-check-"


def refuse_file(storage: Storage) -> None:
    """Refuses an output in whose place, or above it, is a file.

    Raises:
        InputError: one is.
        StorageError: the store failed for longer than `storage_patience`.
    """
    with told_if_slow(lambda: f"output {storage.url}: still looking at it{storage.last_error}"):
        if storage.local:
            file = storage.with_retries("look at the output", lambda: _file_in_path(Path(storage.root)))
        else:
            file = storage.url if _is_object(storage) else None
    if file is not None:
        raise InputError(f"output {storage.url!r}: {file!r} is a file; an output is a directory, name another")


def _file_in_path(path: Path) -> str | None:
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    return None if existing.is_dir() else str(existing)


def _is_object(storage: Storage) -> bool:
    if "/" not in storage.root:
        return False  # a bucket
    try:
        return bool(storage.info("")["type"] == "file")
    except StorageError as error:
        if error.refused:  # it does not exist, or this user may use objects but not ask for it
            return False
        raise


def require_writable(storage: Storage) -> None:
    """Writes an object of its own into an output and removes it. A directory that is not there yet is not made: the
    nearest above it is written to.

    Raises:
        InputError: the store refuses.
        StorageError: the store failed for longer than `storage_patience`, or refuses to remove the object.
    """
    try:
        if storage.local:
            storage.with_retries("write there", lambda: _write_file(Path(storage.root)))
            return
        name = PREFIX + secrets.token_hex(8)
        storage.put(name, b"gaudi-batch check removes this")
    except StorageError as error:
        if not error.refused:
            raise
        raise InputError(f"output {storage.url!r} can't be written: {error}") from None
    storage.remove(name)


def _write_file(path: Path) -> None:
    existing = next(place for place in (path, *path.parents) if place.is_dir())
    with tempfile.NamedTemporaryFile(dir=existing, prefix=PREFIX) as file:
        file.write(b"gaudi-batch check removes this")
        file.flush()
        os.fsync(file.fileno())
