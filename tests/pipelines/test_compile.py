"""Mode `compile`: one graph for each shape, no break in the denoiser, none at a shard's end.

An emulated card has no compiler, as torch can't look into its tensors, so the CPU shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gaudi_batch import JobConfig
from gaudi_batch.card.shard_runner import ShardMaker, ShardRows
from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.pipelines.base import Generated, Item
from gaudi_batch.pipelines.fetching import NO_PEERS
from gaudi_batch.pipelines.native import compile_denoiser, forget_compiled
from gaudi_batch.pipelines.sources import describe_model
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.decisions import ShardTask

pytestmark = pytest.mark.torch

STEPS = 2
MODELS = {"xl": 5.0, "sd3": 7.0, "flux": 3.5, "qwen": 4.0, "aura": 3.5}
"""Tiny models, and a guidance scale for each."""


class Compiler:
    """Counts what it is given, and gives back what runs it as it is."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def breaks() -> Iterator[Any]:
    """What torch counts of reasons for which it left a graph."""
    import torch

    forget_compiled()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield counters["graph_break"]
    forget_compiled()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saves a model, if it is not yet, and returns its directory."""
    import tiny

    directory = tmp_path_factory.mktemp("models")
    return cache(lambda name: tiny.save(getattr(tiny, name), directory / name))


class Job:
    """A job of shards of a few rows on the CPU.

    Args:
        model: a model.
        guidance: the guidance scale of its rows.
        compiler: of the denoiser; None leaves it as it is.
        max_graphs: see `compile_denoiser`.
    """

    def __init__(
        self, model: Path | str, guidance: float, compiler: Compiler | None = None, max_graphs: int = 16
    ) -> None:
        from gaudi_batch.pipelines.calls import prepare_calls
        from gaudi_batch.pipelines.loading import load

        self.config = JobConfig(prompts="p", output="o", model=str(model), device="cpu", batch_size=2, seed=0)
        self.guidance = guidance
        described = describe_model(self.config)
        self.family = described.family
        self.pipeline, _ = load(described, "float32", NO_PEERS)
        if compiler is not None:
            compile_denoiser(self.pipeline, compiler, max_graphs)
        prepare_calls(self.pipeline, self.family)

    def make(self, size: tuple[int, int], rows: int, guidance: float | None = None) -> np.ndarray[Any, Any]:
        """The images of one shard, whose last batch is a short one if the number of rows is odd."""
        from gaudi_batch.pipelines.calls import call_arguments, collect, graph_key

        bucket = Bucket(*size, STEPS, self.guidance if guidance is None else guidance)
        task = ShardTask(Shard(0, 0, 0, rows, bucket, rows, rows), "a1")
        prompts = [
            PromptRow(row, str(row), "a red circle" if row % 2 else "a star", "", row, bucket, 1, None)
            for row in range(rows)
        ]

        def call(items: list[Item]) -> Generated:
            output = self.pipeline(**call_arguments(self.pipeline, self.family, bucket, items))
            return collect(self.pipeline, self.family, output, items)

        maker = ShardMaker(
            ShardRows(task, prompts, pa.table({})),
            self.config,
            call,
            graph_key=partial(graph_key, self.pipeline, self.family, bucket),
        )
        made = np.stack([image.pixels for batch in maker.batches() for image in batch])
        assert maker.failures == {}
        return made


@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("xl", "sd3", "qwen", "aura"))]
)
def test_each_shape_is_one_graph_without_a_break(name: str, saved: Callable[[str], Path], breaks: Any) -> None:
    shards = [((64, 64), 3), ((64, 96), 1), ((64, 64), 2)]
    job = Job(saved(name), MODELS[name])
    plain = [job.make(size, rows) for size, rows in shards]
    compiler = Compiler()
    job = Job(saved(name), MODELS[name], compiler)
    compiled = [job.make(size, rows) for size, rows in shards]
    assert compiler.graphs == 2
    assert not breaks, dict(breaks)
    for one, other in zip(plain, compiled, strict=True):
        assert np.abs(one - other).max() < 1e-5


@pytest.mark.thorough
def test_shapes_beyond_torchs_own_limit_are_compiled_and_go_together(
    saved: Callable[[str], Path], breaks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    compiler = Compiler()
    job = Job(saved("flux"), 3.5, compiler, max_graphs=3)
    sizes = [(32 + 16 * width, 32) for width in range(3)]
    for _ in range(2):
        for size in sizes:
            job.make(size, 1)
    assert compiler.graphs == len(sizes)
    forget_compiled()
    job.make(sizes[0], 1)
    assert compiler.graphs == len(sizes) + 1


def test_a_compiler_that_torch_does_not_know_is_named() -> None:
    with pytest.raises(RuntimeError, match="torch knows no compiler hpu_backend here"):
        compile_denoiser(object(), "hpu_backend", 16)
