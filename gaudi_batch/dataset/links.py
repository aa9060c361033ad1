"""Local directories with links followed; fsspec passes over directories that are links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

FSCK = "lost+found"
"""The directory at the root of many file systems that only its owner can read."""


def is_hidden(path: str) -> bool:
    """Whether a name in a relative path begins with a dot or an underscore, the mark of Spark and Hive for files that
    are no data."""
    return any(part.startswith((".", "_")) for part in path.strip("/").split("/"))


class LinkedFileSystem(LocalFileSystem):  # type: ignore[misc]
    """The local file system with links followed. It remembers the links that it could not follow.

    Args:
        base: the directory that is searched; of what is hidden below it nothing is said.
    """

    cachable = False

    def __init__(self, base: str) -> None:
        super().__init__()
        self._base = base
        self.broken: set[str] = set()
        """Links to nothing."""
        self.loops: set[str] = set()
        """Links to a directory above them."""

    def info(self, path: Any, **options: Any) -> dict[str, Any]:
        """See fsspec; a link to a directory counts as a directory, unless it is below that directory."""
        entry: dict[str, Any] = super().info(path, **options)
        if entry["islink"] and entry["type"] == "other":
            link = Path(entry["name"])
            if link.is_dir():
                if any(parent.samefile(link) for parent in link.parents):
                    self.loops.add(entry["name"])
                else:
                    entry["type"] = "directory"
            elif not link.exists():
                self.broken.add(entry["name"])
        return entry

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: str | Callable[[OSError], None] = "omit",
        **options: Any,
    ) -> Iterator[Any]:
        """See fsspec; a directory that can't be read is an error and not empty."""
        return super().walk(path, maxdepth, topdown, self._failed, **options)  # type: ignore[no-any-return]

    def _failed(self, error: OSError) -> None:
        name = os.fspath(error.filename)
        if not is_hidden(name[len(self._base) :]) and Path(name).name != FSCK:
            raise error
