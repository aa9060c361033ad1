"""The licence of a model, where its files say it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gaudi_batch.errors import GaudiBatchError
from gaudi_batch.pipelines.sources import BUILTIN, builtin_directory
from gaudi_batch.storage.filesystem import expanded
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import load_yaml

MODEL_CARD = "README.md"
RETRY_TIMEOUT_S = 10.0


def licence_of(job: Mapping[str, Any], fingerprint: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """The licence that the card of a run's model names; None if there is none, or it can't be had from here.

    Args:
        job: as run.json has it.
        fingerprint: the same.
        options: fsspec options of a store that has the model.
    """
    card = _model_card(job, fingerprint, options)
    if card is None or not card.startswith("---"):
        return None
    try:
        front = load_yaml(card[3:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if not isinstance(front, dict):
        return None
    names = [str(front[name]) for name in ("license", "license_name", "license_link") if front.get(name)]
    return ", ".join(names) or None


def _model_card(job: Mapping[str, Any], fingerprint: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    name = str(job.get("model") or "")
    if not name or job.get("device") == "simulated":
        return None
    directory = builtin_directory(name) if name.startswith(BUILTIN) else expanded(name)
    try:
        if directory.is_dir():
            return (directory / MODEL_CARD).read_text(encoding="utf-8", errors="replace")
        if "://" in name:
            data = Storage(name, options, RETRY_TIMEOUT_S, read_only=True).get(MODEL_CARD)
            return None if data is None else data.decode("utf-8", "replace")
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(name, MODEL_CARD, revision=fingerprint.get("model_revision") or None)
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError, GaudiBatchError):  # huggingface_hub's own errors among them
        return None
