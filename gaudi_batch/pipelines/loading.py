"""Loads a model with diffusers, on the host: fetched, checked, its digest taken beside that."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from gaudi_batch.pipelines.fetching import Peers
from gaudi_batch.pipelines.lora import fetch_lora
from gaudi_batch.pipelines.model_cache import cache_of_node
from gaudi_batch.pipelines.origins import HubOrigin, StoreOrigin
from gaudi_batch.pipelines.sources import BUILTIN, ModelInfo, builtin_directory, digest
from gaudi_batch.pipelines.trust import refuse_code
from gaudi_batch.text import one_line

NO_PART = "No LoRA keys associated to"
"""How diffusers begins to say that a LoRA has nothing for one of a pipeline's components."""
CACHE = Path.home() / ".cache/gaudi-batch"
LORA_CACHE = CACHE / "loras"
"""Where a node keeps LoRAs from stores."""
MODELS = cache_of_node()
"""The models on this node, but for those that the hub's own library keeps."""


def load(model: ModelInfo, dtype: str, peers: Peers) -> tuple[Any, Callable[[], str]]:
    """Diffusers' own pipeline of a model's class, with the family's scheduler or its own, before `prepare_calls`.

    Args:
        model: the model.
        dtype: float32 or bfloat16.
        peers: see `load_pipeline`.

    Returns:
        The pipeline, on the host, and what waits for the model's revision (see `revision_beside`).
    """
    silence_libraries()
    pipeline_class = getattr(diffusers, model.pipeline_class)
    path = fetch(model, peers)
    revision = revision_beside(model, path)
    pipeline = pipeline_class.from_pretrained(
        path,
        torch_dtype=getattr(torch, dtype),
        use_safetensors=model.use_safetensors or None,
    )
    fuse_loras(pipeline, model)
    if model.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, model.scheduler).from_config(pipeline.scheduler.config)
    return pipeline, revision


def fuse_loras(pipeline: Any, model: ModelInfo) -> None:
    """Adds the model's LoRAs to its weights, which then need nothing more of them: neither graphs nor steps differ.

    Raises:
        RuntimeError: the pipeline takes none, or took nothing or not all of one.
    """
    if not model.loras:
        return
    if not hasattr(pipeline, "fuse_lora"):
        raise RuntimeError(f"{type(pipeline).__name__} takes no LoRA")
    names = [f"lora_{number}" for number in range(len(model.loras))]
    for name, lora in zip(names, model.loras, strict=True):
        file = fetch_lora(lora, LORA_CACHE)
        pipeline_class = type(pipeline).__name__
        with _warnings_of_diffusers() as warnings:
            try:
                pipeline.load_lora_weights(
                    str(file.parent),
                    weight_name=file.name,
                    adapter_name=name,
                    use_safetensors=True,
                    local_files_only=True,
                )
            except Exception as error:
                raise RuntimeError(
                    f"lora {lora.name!r} does not fit {pipeline_class} {model.name!r}: {one_line(error, 300)}"
                ) from error
        left_out = [warning for warning in warnings if not warning.startswith(NO_PART)]
        if left_out or not any(name in adapters for adapters in pipeline.get_list_adapters().values()):
            what = one_line(left_out[0], 300) if left_out else "nothing of it"
            raise RuntimeError(f"diffusers does not take all of lora {lora.name!r} for {pipeline_class}: {what}")
    pipeline.set_adapters(names, [lora.scale for lora in model.loras])
    # Its default leaves text encoders of some classes out.
    pipeline.fuse_lora(components=list(pipeline._lora_loadable_modules), adapter_names=names)
    pipeline.unload_lora_weights()


@contextlib.contextmanager
def _warnings_of_diffusers() -> Iterator[list[str]]:
    """Yields what diffusers warns of meanwhile: it passes over what it does not know with no more than that."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    others = [each for each in logger.handlers if each is not handler]
    for other in others:
        logger.removeHandler(other)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        for other in others:
            logger.addHandler(other)


def fetch(model: ModelInfo, peers: Peers) -> str:
    """The directory from which a model is loaded, fetched if need be. It is checked again now that all
    files are there: the driver saw only the model's JSON files, maybe on another machine.

    Args:
        model: the model.
        peers: see `load_pipeline`.

    Raises:
        InputError: loading it would run code.
    """
    path = model.path
    if model.storage is not None:
        path = str(MODELS.get(StoreOrigin(model.revision, model.storage, model.files), peers))
    elif model.name.startswith(BUILTIN):
        path = str(builtin_directory(model.name))  # it may be elsewhere than the driver's
    elif model.hub:
        path = str(MODELS.get(HubOrigin(model, MODELS.root), peers))
    refuse_code(model.name, Path(path))
    return path


def revision_beside(model: ModelInfo, path: str) -> Callable[[], str]:
    """Begins to find out which model lies in a directory, in a thread beside its being loaded from there. A digest of
    10 GB takes a core 7 s, or 20 s without its instructions for SHA-256; what the disk gives once, the page cache gives
    all cards of the node.

    Args:
        model: the model.
        path: where `fetch` has put it.

    Returns:
        What waits for the answer: the commit of a hub model, the SHA-256 of a directory's files.
    """
    if model.storage is not None or model.hub:
        return lambda: Path(path).name  # its directory has the name of its revision, and each file was compared
    pool = ThreadPoolExecutor(1, "digest")
    revision = pool.submit(digest, Path(path), model.use_safetensors)
    pool.shutdown(wait=False)
    return revision.result


def silence_libraries() -> None:
    """Keeps the libraries' own logs down: diffusers prints prompts, and progress bars have no place in a card."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
