"""Diffusers' own pipelines on one Gaudi card in eager mode, without optimum-habana: the denoiser compiled or not.

Nothing of Intel's stack is imported with this module. What its bridge reads from the environment once, at its own
import, is there before (see gaudi_environment.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import DeviceMemory, Generated, Item
from gaudi_batch.pipelines.fetching import NO_PEERS, Peers
from gaudi_batch.pipelines.gaudi_environment import prepare, require_stack
from gaudi_batch.pipelines.hpu import WARMUP_BATCHES, acquire, describe_device, explained, take_memory_peak
from gaudi_batch.pipelines.sources import ModelInfo
from gaudi_batch.pipelines.stack import NATIVE_PACKAGES, versions
from gaudi_batch.plan import Bucket

BACKEND = "hpu_backend"
"""The name under which Intel's bridge registers its compiler with torch, if it is not lazy."""
DENOISERS = ("unet", "transformer", "transformer_2")
"""Components of diffusers' pipelines that are called at each step."""
GRAPHS_A_KEY = 2
"""Graphs that torch may keep for one graph key: some denoisers are called with guidance and without at each step."""


class NativePipeline:
    """A diffusers text-to-image pipeline, of the class that the model's model_index.json names, on the card that Ray
    pinned to this process.

    Args:
        config: the job, of mode `compile` or `eager`.
        model: its model, resolved.
        threads: threads of the host beside this card.
        peers: see `load_pipeline`.

    Raises:
        RuntimeError: Intel's stack is not there, or the card can't be had; the message says what to do.
    """

    def __init__(self, config: JobConfig, model: ModelInfo, threads: int, peers: Peers = NO_PEERS) -> None:
        require_stack(config.gaudi.mode)
        prepare(config)
        import torch

        from gaudi_batch.pipelines.calls import prepare_calls
        from gaudi_batch.pipelines.loading import load

        torch.set_num_threads(threads)
        importlib.import_module("habana_frameworks.torch.core")  # registers the device and the compiler
        self._hpu = importlib.import_module("habana_frameworks.torch.hpu")
        acquire(self._hpu)
        self.device = describe_device(self._hpu)
        self._is_compiled = config.gaudi.mode == "compile"
        self.warmup_batches = WARMUP_BATCHES if self._is_compiled else 1
        pipeline, revision = load(model, config.dtype or "bfloat16", peers)
        try:
            # Without this, diffusers would have Intel's bridge rewrite calls of CUDA, of which there are none.
            self._pipeline = pipeline.to("hpu", hpu_migration=False)
        except RuntimeError as error:
            raise explained(error, None, 0) from error
        if self._is_compiled:
            compile_denoiser(self._pipeline, BACKEND, config.gaudi.max_graphs)
        prepare_calls(self._pipeline, model.family)
        self._family = model.family
        self.stack: Mapping[str, str] = versions(NATIVE_PACKAGES, bool(model.loras)) | {"device": self.device}
        self.model = revision()
        self.threads: int | None = torch.get_num_threads()

    def generate(self, bucket: Bucket, items: list[Item]) -> Generated:
        """One call of the pipeline, with a generator on the host of its own for each image.

        Raises:
            DeviceError: the device, its driver or its memory failed.
        """
        from gaudi_batch.pipelines.calls import call_arguments, collect

        try:
            output = self._pipeline(**call_arguments(self._pipeline, self._family, bucket, items))
        except RuntimeError as error:
            raise explained(error, bucket, len(items)) from error
        return collect(self._pipeline, self._family, output, items)

    def graph_key(self, bucket: Bucket, item: Item) -> Hashable:
        """See `Pipeline`."""
        from gaudi_batch.pipelines.calls import graph_key

        return graph_key(self._pipeline, self._family, bucket, item)

    def forget(self, key: Hashable) -> bool:
        """Drops what is compiled, which torch can only do for all keys at once."""
        if self._is_compiled:
            forget_compiled()
        return self._is_compiled

    def take_memory_peak(self) -> DeviceMemory:
        """What tensors have taken of the device's memory, see `Pipeline`."""
        return take_memory_peak(self._hpu)

    def notes(self) -> list[str]:
        """None."""
        return []


def compile_denoiser(pipeline: Any, backend: str | Callable[..., Any], max_graphs: int) -> None:
    """Has torch compile what a pipeline calls at each step, a graph for each shape.

    Args:
        pipeline: of diffusers, on its device, before `prepare_calls`: what that pads texts with stays outside.
        backend: the compiler, by its name in torch or as a function.
        max_graphs: graph keys whose graphs are kept.

    Raises:
        RuntimeError: torch knows no compiler of that name.
    """
    import torch

    if isinstance(backend, str) and backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise RuntimeError(
            f"torch knows no compiler {backend} here: Intel's bridge registers it, unless it is lazy; choose"
            " --gaudi.mode eager, or lazy"
        )
    # Beyond its limit torch would go on without compiling, and say so only in its log.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS_A_KEY * max_graphs)
    for name in DENOISERS:
        component = getattr(pipeline, name, None)
        if isinstance(component, torch.nn.Module):
            component.forward = torch.compile(component.forward, backend=backend, dynamic=False)


def forget_compiled() -> None:
    """Drops all that torch has compiled in this process."""
    import torch

    torch._dynamo.reset()
