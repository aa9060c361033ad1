"""Temporary directories."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gaudi_batch.errors import StorageError


@contextlib.contextmanager
def scratch_directory(use: str) -> Iterator[str]:
    """Makes a directory under TMPDIR, or in the system's places for temporary files, and removes it at the end.

    Args:
        use: what it is for, as in "join the manifests".

    Raises:
        StorageError: none of the places can be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="gaudi-batch-", ignore_cleanup_errors=True)
            )
        except OSError:
            raise StorageError(
                f"can't {use}: no temporary directory can be written; set TMPDIR to one that can", refused=True
            ) from None
        yield directory


@contextlib.contextmanager
def scratch_errors(use: str) -> Iterator[None]:
    """Raises StorageError where a temporary file can't be written or read.

    Args:
        use: what it is for, as in "join the manifests".
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"can't {use} in {tempfile.gettempdir()}: {error.strerror or error}; make room there or set TMPDIR"
        ) from None


def sha256_of(path: str) -> str:
    """The SHA-256 of a local file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
