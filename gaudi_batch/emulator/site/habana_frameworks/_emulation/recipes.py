"""Compiled recipes on disk, in the files and under the locks of the bridge (recipe_cache.cpp and cache_file_handler.cpp
of Intel's gaudi-pytorch-bridge): a graph that one process has compiled costs no other the time of its compilation.

A recipe is two files that are named after the graph. The metadata come last; while they are empty there is no recipe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from habana_frameworks._emulation.counters import counters
from habana_frameworks._emulation.settings import SYNAPSE_VERSION, settings

CONFIG = "PT_HPU_RECIPE_CACHE_CONFIG"
ENVIRONMENT = 17
"""A hash of the environment and the libraries, which are always the same here."""
RECIPE_SIZE = 4096
"""Bytes of a recipe here; a real one has megabytes."""


def compile_graph(name: str) -> None:
    """Takes the time that compiling a graph costs, unless its recipe is on disk, and puts it there."""
    directory = os.environ.get(CONFIG, "").partition(",")[0]
    name = f"{name}_{ENVIRONMENT}_syn{SYNAPSE_VERSION}.0a1b2c3"  # as disk_cache.cpp of the bridge names it
    metadata = Path(directory, f"{name}.metadata")
    if directory and _is_there(metadata):
        counters.count("recipes_loaded")
        return
    counters.count("compilations")
    time.sleep(settings().capture_seconds)
    if directory:
        metadata.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(metadata, os.O_RDWR | os.O_CREAT, 0o777)
        with _locked(descriptor):
            if not os.fstat(descriptor).st_size:
                metadata.with_suffix(".recipe").write_bytes(name.encode().ljust(RECIPE_SIZE))
                metadata.write_text(name)


def _is_there(metadata: Path) -> bool:
    try:
        descriptor = os.open(metadata, os.O_RDONLY)
    except FileNotFoundError:
        return False
    with _locked(descriptor):
        recipe = metadata.with_suffix(".recipe")
        return bool(os.fstat(descriptor).st_size) and recipe.read_bytes() == metadata.read_bytes().ljust(RECIPE_SIZE)


@contextlib.contextmanager
def _locked(descriptor: int) -> Iterator[None]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
