"""An object on a disk or a shared file system, written so that a reader sees the whole of it or none."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

PART_MARK = ".part-"
"""What the names of files have that are being written."""
_PART = re.compile(rf"\.(.+){re.escape(PART_MARK)}[0-9a-f]{{8}}")


def write_whole(path: Path, write: Callable[[str], Any], keep: Callable[[], bool], *, create: bool) -> bool:
    """Writes a file under another name and renames it; returns whether it has its name.

    Args:
        path: the file, in a directory that is there.
        write: writes to the path that it is given.
        keep: asked when all is written, since nothing can end a write.
        create: whether it is to have its name only where no file has.

    Raises:
        TimeoutError: `keep` said no.
        OSError: it can't be written.
    """
    # The name makes readers of the directory as a dataset pass over it.
    part = path.with_name(f".{path.name}{PART_MARK}{uuid.uuid4().hex[:8]}")
    try:
        write(str(part))
        sync(part)
        if not keep():
            raise TimeoutError("what was written came too late to get its name")
        if create:
            return _link(part, path)
        part.replace(path)
        return True
    finally:
        part.unlink(missing_ok=True)


def parse_part(name: str) -> str | None:
    """The name of the file that is written under this name until it is whole; None if this is no such name."""
    match = _PART.fullmatch(name)
    return match[1] if match else None


def sync(path: Path) -> None:
    """Flushes a file to its disk before it gets its name, so that a power cut leaves no empty file of that name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _link(part: Path, path: Path) -> bool:
    """Gives a file its name unless the name is taken; returns whether it did. Where hard links are missing, a file of
    that name is overwritten."""
    try:
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        part.replace(path)
    return True
