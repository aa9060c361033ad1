"""The files of a model: their names, what JSON files say, and the shapes of weights."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.pipelines.lora import DENOISERS, TEXT_ENCODERS
from gaudi_batch.pipelines.safetensors_files import Shapes, read_shapes
from gaudi_batch.storage.listing import Entry
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

WEIGHT_SUFFIXES = {".safetensors", ".json", ".txt", ".model"}
"""Files that may shape an image."""
INDEX = "model_index.json"
TEMPLATE = ".jinja"
"""Templates of chats, of which some text encoders make prompts."""
_COMPONENT = re.compile(r"\w+")
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model|pytorch_model)(-\d+-of-\d+)?")
"""Names of weights that diffusers and transformers load where no variant is named (`WEIGHTS_NAME` and its like)."""
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


def entries_of_model(storage: Storage, use_safetensors: bool) -> dict[str, Entry]:
    """The files of a model in a store that diffusers loads: its index, and those of the components that this names,
    without weights of other kinds and variants. Raises InputError or StorageError.

    Args:
        storage: where the model lies.
        use_safetensors: whether pickled weights are left out.
    """
    index = storage.entry(INDEX)
    if index is None:
        raise InputError(f"model {storage.url!r}: there is nothing in {storage.url} named {INDEX}")
    files = {INDEX: index}
    try:
        names = components_of(json.loads(storage.get(INDEX) or b""))
    except (ValueError, AttributeError) as error:
        raise InputError(f"model {storage.url!r}: {INDEX} can't be read: {one_line(error)}") from None
    for component in names:
        if not _COMPONENT.fullmatch(component):
            raise InputError(f"model {storage.url!r}: {INDEX} names a component {component!r}, which is no name")
        own = storage.entries(component)
        files |= {f"{component}/{name}": entry for name, entry in own.items() if is_loaded(name, use_safetensors)}
    return files


def components_of(index: Mapping[str, Any]) -> list[str]:
    """The components that a model_index.json names and that have a directory."""
    return [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]


def is_loaded(name: str, use_safetensors: bool) -> bool:
    """Whether diffusers or transformers load a file of a component, as far as its name says."""
    suffix = Path(name).suffix
    if suffix in (".safetensors", PICKLED):
        return bool(_WEIGHTS.fullmatch(Path(name).stem)) and not (use_safetensors and suffix == PICKLED)
    return suffix in WEIGHT_SUFFIXES | {TEMPLATE}


def weight_shapes(name: str, directory: Path, commit: str | None, storage: Storage | None) -> dict[str, Shapes | None]:
    """Shapes of the weights that a LoRA may change, by the model's components; None for those that are not known here:
    a hub does not tell, or they are pickled.

    Args:
        name: of the model.
        directory: its JSON files, and on this machine all.
        commit: of a hub's model.
        storage: of a model in a store.

    Raises:
        StorageError: storage failed.
    """
    files, _ = files_of_model(name, directory, commit)
    components = components_of(read_json(f"model {name!r}", directory, INDEX))
    weights: dict[str, Shapes | None] = {}
    for component in (each for each in (*DENOISERS, *TEXT_ENCODERS) if each in components):
        shapes: dict[str, tuple[int, ...]] = {}
        try:
            for file in files:
                if file.startswith(f"{component}/") and file.endswith(".safetensors"):
                    if commit is not None:
                        shapes |= _hub_shapes(name, commit, file)
                    elif storage is not None:
                        shapes |= read_shapes(partial(storage.get_range, file))
                    else:
                        shapes |= _file_shapes(directory / file)
        except StorageError:
            raise
        except Exception as error:
            log.debug("model %s: what its %s is like is not known here: %s", name, component, one_line(error))
            shapes = {}
        weights[component] = shapes or None
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
