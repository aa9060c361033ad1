"""Diffusers on the CPU: the embedded default where there is no card."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Hashable, Mapping
from pathlib import Path

import torch

from gaudi_batch.pipelines.base import Generated, Item
from gaudi_batch.pipelines.calls import call_arguments, collect, graph_key, prepare_calls
from gaudi_batch.pipelines.fetching import NO_PEERS, Peers
from gaudi_batch.pipelines.loading import load
from gaudi_batch.pipelines.sources import ModelInfo
from gaudi_batch.pipelines.stack import TORCH_PACKAGES, versions
from gaudi_batch.plan import Bucket


class CpuPipeline:
    """A diffusers text-to-image pipeline, of the class that the model's model_index.json names.

    Args:
        model: which model, as resolved by the driver.
        threads: torch threads of this card, which images depend on in the last bits.
        dtype: float32 or bfloat16.
        peers: see `load_pipeline`.
    """

    device = "cpu"
    warmup_batches = 1

    def __init__(self, model: ModelInfo, threads: int, dtype: str, peers: Peers = NO_PEERS) -> None:
        torch.set_num_threads(threads)
        self._pipeline, revision = load(model, dtype, peers)
        prepare_calls(self._pipeline, model.family)
        self._family = model.family
        self.stack: Mapping[str, str] = versions(TORCH_PACKAGES, bool(model.loras)) | {"device": _describe_cpu()}
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


def _describe_cpu() -> str:
    """The CPU's name: libraries choose by it the kernels that round an image's last bits."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = match[1] if match else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
