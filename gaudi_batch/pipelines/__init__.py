"""Pipelines that generate images: one for each device, behind one protocol."""

from __future__ import annotations

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.pipelines.base import Pipeline
from gaudi_batch.pipelines.cpus import share_of_node
from gaudi_batch.pipelines.fetching import NO_PEERS, Peers
from gaudi_batch.pipelines.sources import ModelInfo


def load_pipeline(
    config: JobConfig, model: ModelInfo, threads: int | None, module: int | None, peers: Peers = NO_PEERS
) -> Pipeline:
    """Loads the pipeline of a card. The heavy imports happen here, in the card's own process.

    Args:
        config: the job, its device resolved.
        model: its model, resolved.
        threads: threads of this card; None on hpu is its share of its node.
        module: the module that Ray pinned, None where the device has none.
        peers: the other nodes of the job, which may have the model already.
    """
    if config.device == "simulated":
        from gaudi_batch.pipelines.simulated import SimulatedPipeline

        return SimulatedPipeline(config.simulated, module)
    if config.device == "hpu" and config.gaudi.mode != "lazy":
        from gaudi_batch.pipelines.native import NativePipeline

        return NativePipeline(config, model, threads or share_of_node(), peers)
    if config.device == "hpu":
        from gaudi_batch.pipelines.gaudi import GaudiPipeline

        return GaudiPipeline(config, model, threads or share_of_node(), peers)
    from gaudi_batch.pipelines.cpu import CpuPipeline

    assert threads is not None
    return CpuPipeline(model, threads, config.dtype or "float32", peers)
