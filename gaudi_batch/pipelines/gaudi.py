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
from collections.abc import Hashable, Mapping
from typing import Any

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import DeviceError, DeviceMemory, Generated, Item, OutOfDeviceMemory
from gaudi_batch.pipelines.families import Family
from gaudi_batch.pipelines.fetching import NO_PEERS, Peers
from gaudi_batch.pipelines.gaudi_environment import (
    _OP_LISTS,
    digest_of_quantization,
    gaudi_mapping,
    prepare,
    require_quantization,
    require_stack,
)
from gaudi_batch.pipelines.hpu import WARMUP_BATCHES, acquire, describe_device, explained, take_memory_peak
from gaudi_batch.pipelines.sources import ModelInfo
from gaudi_batch.pipelines.stack import HPU_PACKAGES, versions
from gaudi_batch.plan import Bucket
from gaudi_batch.text import one_line


class GaudiPipeline:
    """An optimum-habana text-to-image pipeline on the card that Ray pinned to this process.

    Args:
        config: the job, its Gaudi config resolved.
        model: its model, resolved.
        threads: threads of the host beside this card.
        peers: see `load_pipeline`.

    Raises:
        RuntimeError: Intel's stack is not there, or the card can't be had; the message says what to do.
    """

    warmup_batches = WARMUP_BATCHES

    def __init__(self, config: JobConfig, model: ModelInfo, threads: int, peers: Peers = NO_PEERS) -> None:
        require_stack(config.gaudi.mode)
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
        from gaudi_batch.pipelines.loading import fetch, fuse_loras, revision_beside, silence_libraries

        if config.gaudi.quantize is not None:
            require_quantization(config.gaudi.quantize)
        torch.set_num_threads(threads)
        silence_libraries()
        hpu = importlib.import_module("habana_frameworks.torch.hpu")
        acquire(hpu)
        self.device = describe_device(hpu)
        self._hpu = hpu
        self._graphs: dict[Hashable, set[int]] = {}
        pipeline_class = getattr(gaudi_diffusers, model.family.gaudi_class)
        path = fetch(model, peers)
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
            raise explained(error, None, 0) from error
        fuse_loras(self._pipeline, model)
        if config.gaudi.fused_attention is not False:
            _fuse_attention(self._pipeline, model.family)
        if model.pipeline_class == "StableDiffusionXLPipeline":
            _leave_sizes_single_without_guidance(self._pipeline)
        prepare_calls(self._pipeline, model.family)
        self._family = model.family
        self._quant_mode = config.gaudi.quantize.mode if config.gaudi.quantize else None
        self.stack: Mapping[str, str] = versions(HPU_PACKAGES, bool(model.loras)) | {"device": self.device}
        if config.gaudi.quantize:
            self.stack = {**self.stack, "gaudi.quantize": digest_of_quantization(config.gaudi.quantize)}
        self.model = revision()
        self.threads: int | None = torch.get_num_threads()

    def generate(self, bucket: Bucket, items: list[Item]) -> Generated:
        """One call of the pipeline, as one batch, with a generator on the host of its own for each image.

        Raises:
            DeviceError: the device, its driver or its memory failed.
        """
        from gaudi_batch.pipelines.calls import call_arguments, collect

        cache: dict[int, Any] = getattr(self._pipeline, "cache", {})
        before = set(cache)
        # Upstream converts the model in each call that is told so, and one conversion is enough.
        conversion = {"quant_mode": self._quant_mode} if self._quant_mode else {}
        self._quant_mode = None
        try:
            output = self._pipeline(
                **call_arguments(self._pipeline, self._family, bucket, items),
                **conversion,
                batch_size=len(items),
            )
        except Exception as error:
            cause = explained(error, bucket, len(items)) if isinstance(error, RuntimeError) else error
            if conversion and not isinstance(cause, OutOfDeviceMemory):
                # Another call would make images of the model as it is.
                raise DeviceError(f"gaudi.quantize: the model can't be converted: {one_line(error)}") from error
            if cause is error:
                raise
            raise cause from error
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
        return take_memory_peak(self._hpu)

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


def _without_op_lists(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Without the lists of operations, which are in place by now: once the bridge is imported, optimum-habana refuses
    to take them."""
    return {name: value for name, value in mapping.items() if name not in _OP_LISTS.values()}
