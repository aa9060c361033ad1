"""The files of a model: their names, what JSON files say, and the shapes of weights."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

from gaudi_batch.errors import InputError
from gaudi_batch.pipelines.lora import DENOISERS, TEXT_ENCODERS
from gaudi_batch.pipelines.safetensors_files import Shapes, read_shapes
from gaudi_batch.storage.listing import Entry
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
"""Files that may shape an image."""
PICKLED = ".bin"
"""Weights that a job without `use_safetensors` also takes if there are no safetensors."""


def read_json(owner: str, directory: Path, path: str) -> dict[str, Any]:
    """A JSON object that belongs to a model. Raises InputError, which names the owner."""
    try:
        loaded = json.loads((directory / path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{owner} has no {path}, so it is not what it should be") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{owner}: {path} can't be read: {error}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{owner}: {path} is not a JSON object")
    return loaded


def entries_of_model(storage: Storage) -> dict[str, Entry]:
    """The files of a model in a store: those of its directory and of its components'."""
    files = storage.entries("")
    for component in storage.names(""):
        if "." not in component:
            files |= {f"{component}/{name}": entry for name, entry in storage.entries(component).items()}
    return {path: entry for path, entry in files.items() if Path(path).suffix in WEIGHT_SUFFIXES | {PICKLED}}


def weight_shapes(name: str, directory: Path, commit: str | None) -> dict[str, Shapes] | None:
    """Shapes of the weights that a LoRA may change, by component; None if a hub does not tell."""
    files, _ = files_of_model(name, directory, commit)
    weights: dict[str, Shapes] = {}
    try:
        for component in (*DENOISERS, *TEXT_ENCODERS):
            shapes: dict[str, tuple[int, ...]] = {}
            for file in files:
                if file.startswith(f"{component}/") and file.endswith(".safetensors"):
                    shapes |= _hub_shapes(name, commit, file) if commit else _file_shapes(directory / file)
            if shapes:
                weights[component] = shapes
    except Exception as error:
        log.debug("model %s: what its weights are like is not known here: %s", name, one_line(error))
        return None
    return weights


def _file_shapes(file: Path) -> Shapes:
    with file.open("rb") as opened:

        def read(start: int, stop: int) -> bytes:
            opened.seek(start)
            return opened.read(stop - start)

        return read_shapes(read)


def _hub_shapes(name: str, commit: str, file: str) -> Shapes:
    from huggingface_hub import HfApi

    tensors = HfApi().parse_safetensors_file_metadata(name, file, revision=commit).tensors
    return {tensor: tuple(info.shape) for tensor, info in tensors.items()}


def files_of_model(name: str, directory: Path, commit: str | None) -> tuple[set[str], bool]:
    """The files of a model, including those of its components, and whether these are all: of a hub that can't be
    reached, only files fetched before are known."""
    from huggingface_hub import list_repo_files

    if commit is not None:
        with contextlib.suppress(Exception):
            return set(list_repo_files(name, revision=commit)), True
    names = {path.relative_to(directory).as_posix() for pattern in ("*", "*/*") for path in directory.glob(pattern)}
    return names, commit is None
