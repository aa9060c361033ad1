"""What was published of cards stands beside a job of the same settings alone."""

from __future__ import annotations

import pytest

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
