"""What was published of cards stands beside a job of the same settings alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gaudi_batch import JobConfig
from gaudi_batch.bench.published import PUBLISHED, Published
from gaudi_batch.pipelines.families import FAMILIES

each = pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: f"{published.family}, {published.side}")


@each
def test_its_family_and_its_scheduler_are_known(published: Published) -> None:
    (family,) = [family for family in FAMILIES if family.name == published.family]
    assert published.scheduler in family.gaudi_schedulers.values()
    assert published.guided <= family.takes_guidance
    assert published.dtype in ("float32", "bfloat16") or family.hpu_dtype is None, "no job computes so"
    assert published.rates.keys() >= published.latencies.keys()


@each
@pytest.mark.parametrize(
    ("gaudi", "loras", "stands"),
    [
        ({}, (), True),
        ({"mode": "compile"}, (), False),
        ({"quantize": {"config": "scales.json", "mode": "quantize"}}, (), False),
        ({}, ("style",), False),
    ],
)
def test_it_stands_beside_no_other_mode_no_fp8_and_no_lora(
    published: Published, gaudi: dict[str, Any], loras: tuple[str, ...], stands: bool
) -> None:
    family = next(family for family in FAMILIES if family.name == published.family)
    guided = SimpleNamespace(guided=published.guided)
    bucket = SimpleNamespace(width=published.side, height=published.side, steps=published.steps, graph_key=guided)
    job: Any = SimpleNamespace(
        config=JobConfig(prompts="p", output="o", model="a/b", device="hpu", gaudi=gaudi),
        model=SimpleNamespace(family=family, scheduler=published.scheduler, loras=loras),
        rules=SimpleNamespace(bucket=bucket),
        dtype=published.dtype,
    )
    assert published.is_of(job, published.batch_size) == stands
