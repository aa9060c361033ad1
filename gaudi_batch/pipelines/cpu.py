"""Diffusers on the CPU: the embedded default where there is no card."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from gaudi_batch.pipelines.base import Generated, Item
from gaudi_batch.pipelines.calls import call_arguments, graph_key, is_truncated, prepare_calls
from gaudi_batch.pipelines.families import Family
from gaudi_batch.pipelines.sources import BUILTIN, ModelInfo, builtin_directory, digest
from gaudi_batch.pipelines.stack import TORCH_PACKAGES, versions
from gaudi_batch.pipelines.trust import refuse_code
from gaudi_batch.plan import Bucket


class CpuPipeline:
    """A diffusers text-to-image pipeline, of the class that the model's model_index.json names.

    Args:
        model: which model, as resolved by the driver.
        threads: torch threads of this card, which images depend on in the last bits.
        dtype: float32 or bfloat16.
    """

    device = "cpu"
    warmup_batches = 1

    def __init__(self, model: ModelInfo, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        silence_libraries()
        pipeline_class = getattr(diffusers, model.pipeline_class)
        path = fetch(model, pipeline_class)
        revision = revision_beside(model, path)
        self._pipeline = pipeline_class.from_pretrained(
            path,
            torch_dtype=getattr(torch, dtype),
            use_safetensors=model.use_safetensors or None,
        )
        if model.scheduler is not None:
            scheduler_class = getattr(diffusers, model.scheduler)
            self._pipeline.scheduler = scheduler_class.from_config(self._pipeline.scheduler.config)
        prepare_calls(self._pipeline, model.family)
        self._family = model.family
        self.stack: Mapping[str, str] = versions(TORCH_PACKAGES) | {"device": _describe_cpu()}
        self.model = revision()
        self.threads: int | None = torch.get_num_threads()

    def generate(self, bucket: Bucket, items: list[Item]) -> Generated:
        """One call of the pipeline with a generator of its own for each image."""
        output = self._pipeline(**call_arguments(self._pipeline, self._family, bucket, items))
        return collect(self._pipeline, self._family, output, items)

    def graph_key(self, bucket: Bucket, item: Item) -> Hashable:
        """See `Pipeline`."""
        return graph_key(self._pipeline, self._family, bucket, item)

    def forget(self, key: Hashable) -> bool:
        """Does nothing, since nothing is compiled."""
        return False

    def take_memory_peak(self) -> None:
        """Nothing: the host's memory is shared with all else."""

    def notes(self) -> list[str]:
        """None."""
        return []


def fetch(model: ModelInfo, pipeline_class: Any) -> str:
    """The directory from which a model is loaded, fetched from the hub if need be. It is checked again now that all
    files are there: the driver saw only the model's JSON files, maybe on another machine.

    Args:
        model: the model.
        pipeline_class: the class of diffusers, or a child of it, that knows which files it needs.

    Raises:
        InputError: loading it would run code.
    """
    path = model.path
    if model.name.startswith(BUILTIN):
        path = str(builtin_directory(model.name))  # it may be elsewhere than the driver's
    elif model.hub:
        path = str(
            pipeline_class.download(
                model.path,
                revision=model.revision,
                use_safetensors=model.use_safetensors or None,
                trust_remote_code=False,
            )
        )
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
    if model.hub:
        return lambda: Path(path).name  # a snapshot's directory has the name of its commit
    pool = ThreadPoolExecutor(1, "digest")
    revision = pool.submit(digest, Path(path), model.use_safetensors)
    pool.shutdown(wait=False)
    return revision.result


def collect(pipeline: Any, family: Family, output: Any, items: list[Item]) -> Generated:
    """The images of diffusers' output, with the truncation of prompts, which diffusers only logs."""
    flagged = getattr(output, "nsfw_content_detected", None)
    return Generated(
        images=np.asarray(output.images, dtype=np.float32),
        nsfw=[None] * len(items) if flagged is None else [bool(flag) for flag in flagged],
        truncated=[is_truncated(pipeline, family, item.prompt) for item in items],
    )


def silence_libraries() -> None:
    """Keeps the libraries' own logs down: diffusers prints prompts, and progress bars have no place in a card."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _describe_cpu() -> str:
    """The CPU's name: libraries choose by it the kernels that round an image's last bits."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = match[1] if match else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
