"""Refuses models whose loading would run code that came with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gaudi_batch.errors import InputError
from gaudi_batch.pipelines.model_files import read_json
from gaudi_batch.text import short_repr

CODE_PLACES = ("None.py", "*/*.py")
"""Where diffusers 0.35.1 runs what it finds in a model's directory, whatever `trust_remote_code` says: a component's
`<library>.py`, and `None.py` as that of a custom pipeline that nobody asked for."""
SAFETY_CHECKER = ("stable_diffusion", "StableDiffusionSafetyChecker")
"""The one component whose class lies among diffusers' pipelines."""


def refuse_code(name: str, directory: Path) -> None:
    """Refuses a model whose loading would run code of its own: diffusers imports whatever library model_index.json
    names for a component, and runs Python files that lie beside the weights.

    Raises:
        InputError: it would.
    """
    index = read_json(f"model {name!r}", directory, "model_index.json")
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str):
        raise InputError(f"model {name!r} is a {short_repr(pipeline_class)}, which is code of its own; none is run")
    for component, value in index.items():
        if not isinstance(value, list) or component.startswith("_"):
            continue
        if not (component.isidentifier() and len(value) == 2 and (value == [None, None] or _is_plain(*value))):
            raise InputError(
                f"model {name!r}: its {short_repr(component)} is {short_repr(value)}; components of diffusers and"
                " transformers are loaded, and no others"
            )
        config = directory / component / "config.json"
        if config.is_file() and _names_kernel(read_json(f"model {name!r}", directory, f"{component}/config.json")):
            raise InputError(f"model {name!r}: its {component} wants attention from a hub, which is code; none is run")
    for pattern in CODE_PLACES:
        for path in directory.glob(pattern):
            where = path.relative_to(directory).as_posix()
            raise InputError(
                f"model {name!r} brings code ({short_repr(where)}), and loading it would run that; none is run"
            )


def _is_plain(library: Any, name: Any) -> bool:
    """Whether a component is a model, a tokenizer, a scheduler or the like of the two libraries. A pipeline is not: it
    would be loaded by its own model_index.json."""
    if not isinstance(name, str) or not name.isidentifier() or "Pipeline" in name:
        return False
    return library in ("diffusers", "transformers") or (library, name) == SAFETY_CHECKER


def _names_kernel(config: Any) -> bool:
    """Whether a config of transformers names an attention that would be fetched from the hub and imported."""
    remaining = [config]
    while remaining:
        value = remaining.pop()
        remaining += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict) and any("attn_implementation" in key and "/" in str(value[key]) for key in value):
            return True
    return False
