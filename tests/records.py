"""Records of runs that tests begin with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.output import manifest
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.plan import Bucket

BUCKET = Bucket(64, 64, 20, 7.5)


def no_cluster() -> Any:
    pytest.fail("no card is needed")


def failed_manifest(shard: int, rows: dict[int, str]) -> bytes:
    info = CommitInfo(shard, f"aaaaa{shard}", "n-0", "n", 0, len(rows), len(rows), 0, ThroughputTotals())
    info = replace(info, again=shard > 0, failed_before=len(rows) if shard else 0)
    prompts = [PromptRow(row, f"r{row}", "p", "", None, BUCKET, 1, error) for row, error in rows.items()]
    return manifest.build(prompts, pa.table({"topic": ["t"] * len(rows)}), {}, rows, 0, info)
