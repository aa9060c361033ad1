"""HPU graphs and the functions that programs cache them with."""

from __future__ import annotations

from typing import Any

import torch

from habana_frameworks._emulation.graph import HPUGraph
from habana_frameworks.torch.hpu.streams import Stream, default_stream, stream

__all__ = ["CachedParams", "HPUGraph", "copy_to", "input_hash", "wrap_in_hpu_graph"]


class CachedParams:
    """A captured graph with the tensors that it reads and writes."""

    def __init__(self, graph_inputs: Any, graph_outputs: Any, graph: HPUGraph | None = None) -> None:
        self.graph_inputs = graph_inputs
        self.graph_outputs = graph_outputs
        self.graph = graph


def input_hash(inputs: Any) -> int:
    """What distinguishes the inputs of one graph from those of another: shapes of tensors, all else by value."""
    if isinstance(inputs, dict):
        return input_hash(tuple(inputs.items()))
    if isinstance(inputs, (list, tuple)):
        return hash(tuple(input_hash(element) for element in inputs))
    if torch.is_tensor(inputs):
        return hash(inputs.shape)
    return hash(inputs)


def copy_to(destination: Any, source: Any) -> None:
    """Copies the tensors of `source` into those of `destination`, which is made alike."""
    if isinstance(destination, dict):
        for name, value in destination.items():
            copy_to(value, source[name])
    elif isinstance(destination, (list, tuple)):
        for mine, theirs in zip(destination, source, strict=True):
            copy_to(mine, theirs)
    elif torch.is_tensor(destination):
        destination.copy_(source, non_blocking=True)


def wrap_in_hpu_graph(
    module: Any,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
) -> Any:
    """Makes `module.forward` capture a graph for each shape of its inputs and replay it from then on.

    With `max_graphs`, shapes beyond that number run without a graph.
    """
    if dry_run:
        raise NotImplementedError("habana_frameworks.torch.hpu.wrap_in_hpu_graph(dry_run=True) is not emulated")
    plain_forward = module.forward
    cache: dict[int, CachedParams] = {}
    own_stream = Stream()

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = (args, kwargs)
        key = input_hash(inputs)
        cached = cache.get(key)
        if cached is not None and cached.graph is not None:
            copy_to(cached.graph_inputs, inputs)
            cached.graph.replay(asynchronous)
            default_stream().synchronize()
            return cached.graph_outputs
        if max_graphs is not None and len(cache) >= max_graphs:
            return plain_forward(*args, **kwargs)
        with stream(own_stream):
            graph = HPUGraph()
            graph.capture_begin()
            outputs = plain_forward(*args, **kwargs)
            graph.capture_end()
        cache[key] = CachedParams(inputs, outputs, graph)
        return outputs

    module.forward = forward
    module.clear_cache = cache.clear
    return module
