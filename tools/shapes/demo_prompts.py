"""Writes the demo's prompts: `python -m tools.shapes.demo_prompts gaudi_batch/models/demo_prompts.parquet`."""

from __future__ import annotations

import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq

from tools.shapes.pictures import ALL_SCENES, FULL_CAPTIONS, say

COUNT = 200
SEED = 7


def main(path: str) -> None:
    """Writes `COUNT` different scenes with what they show in columns of their own."""
    scenes = random.Random(SEED).sample(ALL_SCENES, COUNT)
    rows = [{"prompt": say(FULL_CAPTIONS[0], scene), **vars(scene)} for scene in scenes]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50, compression="zstd")


if __name__ == "__main__":
    main(sys.argv[1])
