"""Compiled recipes in storage, so that a node need not compile what another node has compiled.

Intel's bridge keeps the recipe of a graph on the node's disk as two files that are named after the graph: `.metadata`,
which it opens and locks first and which is empty as long as the recipe is not whole, and `.recipe`. Some releases
append the rank, which is 0 here, to the directory's name (recipe_cache.cpp, cache_file_handler.cpp and
recipe_cache_config.cpp of gaudi-pytorch-bridge). Their name has a hash of the graph, one of the environment and the
version of Intel's graph compiler (disk_cache.cpp), and says nothing of the kind of card; their place in storage does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gaudi_batch.storage.disk import write_whole
from gaudi_batch.storage.store import Storage

RECIPE, METADATA = ".recipe", ".metadata"
RANK = "0"
RELEASE = "habana-torch-plugin"
"""The package whose version is that of Intel's release."""
_NAME = re.compile(r"\w[\w.-]*")
BRING_THREADS = 8
"""Recipes that are fetched at the same time."""


def place_of(stack: Mapping[str, str]) -> str:
    """The name of the directory for the recipes of a card with this stack (see stack.py)."""
    return re.sub(r"[^\w.]+", "-", f"{stack['device']}-{stack.get(RELEASE, '')}").strip("-")


class Recipes:
    """The recipes of one node, and what storage has of the same kind.

    Args:
        directory: on the node's disk, `gaudi.recipe_cache`.
        storage: of which a directory has the recipes of the same release and card.
        place: that directory.
        max_bytes: of the node's recipes, beyond which the bridge removes the oldest.
        keeps_all: whether all of the node's recipes go to storage, those of earlier jobs among them.
    """

    def __init__(
        self, directory: Path, storage: Storage, place: str, max_bytes: int, *, keeps_all: bool = True
    ) -> None:
        self._directories = (directory, directory.with_name(directory.name + RANK))
        self._lock = directory.with_name(f"{directory.name}.lock")
        self._storage = storage
        self._place = place
        self._max_bytes = max_bytes
        self._stored: set[str] = set()
        self._earlier = set() if keeps_all else self._present()

    def bring(self) -> int:
        """Fetches the recipes that storage has and this node has not; returns how many. The other cards of the node
        wait meanwhile. Raises StorageError."""
        with self._locked(wait=True):
            entries = self._storage.entries(self._place)
            self._stored |= _names(entries)
            chosen: list[str] = []
            left = self._max_bytes - self._bytes()
            for name in sorted(self._stored - self._present()):
                if entries[name + RECIPE].size <= left:
                    chosen.append(name)
                    left -= entries[name + RECIPE].size
            with ThreadPoolExecutor(BRING_THREADS, "bring") as pool:
                return sum(pool.map(self._bring, chosen))

    def _bring(self, name: str) -> bool:
        recipe, metadata = (self._storage.get(f"{self._place}/{name}{suffix}") for suffix in (RECIPE, METADATA))
        if not recipe or not metadata:
            return False  # it has gone since
        return any([self._write(directory / name, recipe, metadata) for directory in self._present_directories()])

    def _write(self, path: Path, recipe: bytes, metadata: bytes) -> bool:
        """Puts a recipe where the bridge finds it, under the bridge's own lock; returns whether it was not there."""
        descriptor = os.open(f"{path}{METADATA}", os.O_RDWR | os.O_CREAT, 0o664)
        with os.fdopen(descriptor, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False  # the bridge compiles it
            if os.fstat(file.fileno()).st_size:
                return False
            write_whole(
                Path(f"{path}{RECIPE}"), lambda part: Path(part).write_bytes(recipe), lambda: True, create=False
            )
            file.write(metadata)
        return True

    def _present_directories(self) -> list[Path]:
        self._directories[0].mkdir(parents=True, exist_ok=True)
        return [directory for directory in self._directories if directory.is_dir()]

    def keep(self) -> int:
        """Puts the recipes into storage that this node has and storage has not; returns how many. Where another card
        of the node is at it, that one does. Raises StorageError."""
        if not self.has_new():
            return 0
        with self._locked(wait=False) as is_mine:
            if not is_mine:
                return 0
            self._stored |= _names(self._storage.entries(self._place))
            new = sorted(self._present() - self._stored - self._earlier)
            return sum(self._keep(name) for name in new)

    def _keep(self, name: str) -> bool:
        try:
            with self._file(name + METADATA).open("rb") as metadata:
                fcntl.flock(metadata, fcntl.LOCK_SH | fcntl.LOCK_NB)
                content = {RECIPE: self._file(name + RECIPE).read_bytes(), METADATA: metadata.read()}
        except (BlockingIOError, FileNotFoundError):
            return False  # the bridge is writing it, or has removed it to make room
        for suffix, data in content.items():
            self._storage.put(f"{self._place}/{name}{suffix}", data)
        self._stored.add(name)
        return True

    def has_new(self) -> bool:
        """Whether this node has recipes that storage seems not to have."""
        return bool(self._present() - self._stored - self._earlier)

    def _present(self) -> set[str]:
        """The names of the node's recipes that are whole."""
        entries = self._sizes()
        return {name for name in _names(entries) if entries[name + METADATA]}

    def _bytes(self) -> int:
        return sum(size for name, size in self._sizes().items() if name.endswith(RECIPE))

    def _sizes(self) -> dict[str, int]:
        """The files of the node's recipes."""
        sizes: dict[str, int] = {}
        for directory in self._directories:
            with contextlib.suppress(FileNotFoundError):
                for file in directory.iterdir():
                    with contextlib.suppress(FileNotFoundError):  # the bridge has removed it
                        sizes[file.name] = file.stat().st_size
        return sizes

    def _file(self, name: str) -> Path:
        """Where a file is; where it would be, if it is not there."""
        places = [directory / name for directory in self._directories]
        return next((path for path in places if path.exists()), places[0])

    @contextlib.contextmanager
    def _locked(self, *, wait: bool) -> Iterator[bool]:
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def _names(files: Collection[str]) -> set[str]:
    """The names of the recipes of which both files are there."""
    whole = {name.removesuffix(METADATA) for name in files if name.endswith(METADATA)}
    return {name for name in whole if name + RECIPE in files and _NAME.fullmatch(name)}
