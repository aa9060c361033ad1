"""Optimum-habana on one Gaudi card: the Gaudi pipeline of the model's class, with its HPU graphs kept warm.

Nothing of Intel's stack is imported with this module. What its bridge reads from the environment once, at its own
import, is there before: Ray sets it for the card's process (`environment`), which first writes the files that it names
(`prepare`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Hashable, Mapping
from typing import Any

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import DeviceError, DeviceMemory, Generated, Item, OutOfDeviceMemory
from gaudi_batch.pipelines.families import Family
from gaudi_batch.pipelines.gaudi_environment import _OP_LISTS, gaudi_mapping, prepare, require_stack
from gaudi_batch.pipelines.sources import ModelInfo
from gaudi_batch.pipelines.stack import HPU_PACKAGES, versions
from gaudi_batch.plan import Bucket

WARMUP_BATCHES = 3
"""First batches of a graph key that compile or may; optimum-habana leaves as many out of its own throughput
(`throughput_warmup_steps` in its pipelines)."""
ACQUIRE_TIMEOUT_S = 30.0
"""Seconds for which a card that is not free is tried again."""
OUT_OF_MEMORY = ("PT_DEVMEM", "Allocation failed for size", "out of memory")
"""Messages of Intel's bridge when device memory is exhausted."""
DEVICE_FAILURES = ("synStatus", "FATAL ERROR :: MODULE:", "Graph compile failed", "Device acquire failed")
"""Messages of Intel's bridge when the driver, the device or the graph compiler has failed."""


class GaudiPipeline:
    """An optimum-habana text-to-image pipeline on the card that Ray pinned to this process.

    Args:
        config: the job, its Gaudi config resolved.
        model: its model, resolved.
        threads: threads of the host beside this card.

    Raises:
        RuntimeError: Intel's stack is not there, or the card can't be had; the message says what to do.
    """

    warmup_batches = WARMUP_BATCHES

    def __init__(self, config: JobConfig, model: ModelInfo, threads: int) -> None:
        require_stack()
        prepare(config)
        # Both log what they do to prompts, at INFO, as soon as they are imported.
        logging.getLogger("optimum").setLevel(logging.ERROR)
        import torch

        try:
            from optimum.habana import GaudiConfig
            from optimum.habana import diffusers as gaudi_diffusers
        except IndexError:
            raise RuntimeError(
                "optimum-habana asks `pip list` for habana-torch-plugin, and the pip on this card's PATH does not know"
                " it; put the pip of the Python that has habana_frameworks first on the PATH of this node's Ray"
            ) from None

        import diffusers

        from gaudi_batch.pipelines.calls import prepare_calls
        from gaudi_batch.pipelines.cpu import fetch, revision_beside, silence_libraries

        torch.set_num_threads(threads)
        silence_libraries()
        hpu = importlib.import_module("habana_frameworks.torch.hpu")
        _acquire(hpu)
        self.device = _describe_device(hpu)
        self._hpu = hpu
        self._graphs: dict[Hashable, set[int]] = {}
        pipeline_class = getattr(gaudi_diffusers, model.family.gaudi_class)
        path = fetch(model, pipeline_class)
        revision = revision_beside(model, path)
        scheduler = {}
        if model.scheduler is not None:
            library = gaudi_diffusers if model.scheduler.startswith("Gaudi") else diffusers
            scheduler_class = getattr(library, model.scheduler)
            scheduler["scheduler"] = scheduler_class.from_pretrained(path, subfolder="scheduler")
        try:
            self._pipeline = pipeline_class.from_pretrained(
                path,
                **scheduler,
                torch_dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
                use_safetensors=model.use_safetensors or None,
                use_habana=True,
                use_hpu_graphs=config.gaudi.hpu_graphs,
                gaudi_config=GaudiConfig(**_without_op_lists(gaudi_mapping(config))),
                # Attention that has no kernel of its own, the VAE's and the text encoder's, as in upstream's commands.
                sdp_on_bf16=config.gaudi.fused_attention is not False,
                log_level=logging.ERROR,
            )
        except RuntimeError as error:
            raise _explained(error, None, 0) from error
        if config.gaudi.fused_attention is not False:
            _fuse_attention(self._pipeline, model.family)
        if model.pipeline_class == "StableDiffusionXLPipeline":
            _leave_sizes_single_without_guidance(self._pipeline)
        prepare_calls(self._pipeline, model.family)
        self._family = model.family
        self.stack: Mapping[str, str] = versions(HPU_PACKAGES) | {"device": self.device}
        self.model = revision()
        self.threads: int | None = torch.get_num_threads()

    def generate(self, bucket: Bucket, items: list[Item]) -> Generated:
        """One call of the pipeline, as one batch, with a generator on the host of its own for each image.

        Raises:
            DeviceError: the device, its driver or its memory failed.
        """
        from gaudi_batch.pipelines.calls import call_arguments
        from gaudi_batch.pipelines.cpu import collect

        cache: dict[int, Any] = getattr(self._pipeline, "cache", {})
        before = set(cache)
        try:
            output = self._pipeline(
                **call_arguments(self._pipeline, self._family, bucket, items), batch_size=len(items)
            )
        except RuntimeError as error:
            raise _explained(error, bucket, len(items)) from error
        finally:
            self._graphs.setdefault(self.graph_key(bucket, items[0]), set()).update(cache.keys() - before)
        return collect(self._pipeline, self._family, output, items)

    def graph_key(self, bucket: Bucket, item: Item) -> Hashable:
        """See `Pipeline`."""
        from gaudi_batch.pipelines.calls import graph_key

        return graph_key(self._pipeline, self._family, bucket, item)

    def forget(self, key: Hashable) -> bool:
        """Drops the graphs of a key and with them their device memory; optimum-habana keeps them for ever. Where it
        keeps them in the transformer, they all go together."""
        for graph in self._graphs.pop(key, ()):
            self._pipeline.cache.pop(graph, None)
        clear = (
            getattr(self._pipeline.transformer, "clear_cache", None) if self._family.denoiser == "transformer" else None
        )
        if self._family.drops_single_graphs or clear is None:  # which is not there without HPU graphs
            return False
        clear()
        return True

    def take_memory_peak(self) -> DeviceMemory:
        """What tensors have taken of the device's memory, see `Pipeline`."""
        peak = self._hpu.max_memory_allocated()
        self._hpu.reset_peak_memory_stats()
        return DeviceMemory(int(peak), int(self._hpu.mem_get_info()[1]))

    def notes(self) -> list[str]:
        """A line for each version that optimum-habana was not validated with."""
        from optimum.habana.utils import CURRENTLY_VALIDATED_SYNAPSE_VERSION, get_driver_version
        from optimum.habana.utils import get_habana_frameworks_version as get_frameworks_version

        validated = CURRENTLY_VALIDATED_SYNAPSE_VERSION
        installed = importlib.metadata.version("optimum-habana")
        versions_here = {"habana_frameworks": get_frameworks_version(), "the Gaudi driver": get_driver_version()}
        return [
            f"optimum-habana {installed} was validated with version {validated} of Intel's stack,"
            f" and {name} here is {version}"
            for name, version in versions_here.items()
            if version is not None and version.release[:2] != validated.release[:2]
        ]


def _fuse_attention(pipeline: Any, family: Family) -> None:
    """Puts Intel's fused attention wherever it can be; it must be there before the first capture."""
    if family.attention == "asked":
        # Upstream leaves this to its caller.
        pipeline.unet.set_default_attn_processor(pipeline.unet)
    for block in getattr(getattr(pipeline, "transformer", None), "transformer_blocks", ()):
        if getattr(block, "attn2", None) is not None:
            # The second attention of Stable Diffusion 3.5 medium, which upstream passes over.
            block.attn2.processor = block.attn.processor


def _leave_sizes_single_without_guidance(pipeline: Any) -> None:
    """Mends optimum-habana's Stable Diffusion XL, which doubles the sizes of images that its UNet gets even where there
    is no guidance and nothing else is doubled."""
    split = pipeline._split_inputs_into_batches

    def split_inputs(*inputs: Any) -> Any:
        *others, negative_sizes = inputs
        return split(*others, negative_sizes if pipeline.do_classifier_free_guidance else None)

    pipeline._split_inputs_into_batches = split_inputs


def _acquire(hpu: Any) -> None:
    """Acquires the card, which the process before this one may still hold."""
    deadline = time.monotonic() + ACQUIRE_TIMEOUT_S
    while True:
        try:
            return hpu.init()  # type: ignore[no-any-return]
        except RuntimeError as error:
            module = os.environ.get("HABANA_VISIBLE_MODULES", "any")
            if "Invalid HABANA_VISIBLE_MODULES" in str(error):
                raise RuntimeError(
                    f"this node has no module {module}; start its Ray with HABANA_VISIBLE_MODULES naming those that"
                    f" hl-smi shows: {error}"
                ) from None
            if "acquire failed" not in str(error) or time.monotonic() > deadline:
                raise RuntimeError(
                    f"module {module} of this node can't be had; hl-smi shows which process holds it: {error}"
                ) from None
        time.sleep(1)


def _describe_device(hpu: Any) -> str:
    emulated = " (emulated)" if getattr(importlib.import_module("habana_frameworks"), "EMULATED", False) else ""
    return f"hpu {hpu.get_device_name()}{emulated}"


def _without_op_lists(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Without the lists of operations, which are in place by now: once the bridge is imported, optimum-habana refuses
    to take them."""
    return {name: value for name, value in mapping.items() if name not in _OP_LISTS.values()}


def _explained(error: RuntimeError, bucket: Bucket | None, batch_size: int) -> RuntimeError:
    """An error of Intel's bridge as what it means; one that means nothing is returned as it is.

    Args:
        error: the error.
        bucket: of the batch, None while the model is loaded.
        batch_size: images of the batch.
    """
    message = " ".join(str(error).split())
    if bucket is None and any(mark in message for mark in OUT_OF_MEMORY):
        return OutOfDeviceMemory(f"the model does not fit into the device's memory; try --dtype bfloat16: {message}")
    if any(mark in message for mark in OUT_OF_MEMORY):
        smaller = (
            f"try --batch-size {batch_size // 2}"
            if batch_size > 1
            else "the batch size is 1 already; try smaller images, or --dtype bfloat16"
        )
        return OutOfDeviceMemory(f"out of device memory at batch size {batch_size} ({bucket}); {smaller}: {message}")
    if any(mark in message for mark in DEVICE_FAILURES):
        return DeviceError(f"the device failed: {message}")
    return error
