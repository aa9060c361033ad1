"""The JSON files of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gaudi_batch.errors import InputError


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
