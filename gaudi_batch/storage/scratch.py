"""Temporary directories."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

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
