"""A process that reads a dataset by Arrow, whole or in part, ends well."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from helpers import S3Server

from gaudi_batch.storage.arrow import arrow_filesystem
from gaudi_batch.storage.store import Storage

FILES = 40
READ = """
import json, sys
import pyarrow.dataset as ds
from gaudi_batch.storage import arrow
from gaudi_batch.storage.store import Storage
url, options, whole_bytes, reading = sys.argv[1:]
arrow.WHOLE_BYTES = int(whole_bytes)
storage = Storage(url, json.loads(options))
paths = [storage.full(name) for name in sorted(storage.names(""))]
dataset = ds.dataset(paths, filesystem=arrow.arrow_filesystem(storage.filesystem), format="parquet")
batches = dataset.to_batches()
rows = dataset.to_table().num_rows if reading == "whole" else next(batches).num_rows
print(rows)
"""


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        storage = Storage(str(tmp_path / "set"))
    else:
        server: S3Server = request.getfixturevalue("s3")
        storage = Storage(server.url(tmp_path.name), server.options)
    memory = pa.BufferOutputStream()
    pq.write_table(pa.table({"row": range(1000), "prompt": [f"prompt {row}" for row in range(1000)]}), memory)
    for number in range(FILES):
        storage.put(f"{number:03d}.parquet", memory.getvalue().to_pybytes())
    return storage


@pytest.mark.parametrize(
    ("reading", "whole_bytes"),
    [("half", 1 << 19), ("half", 0), pytest.param("whole", 0, marks=pytest.mark.thorough)],
    ids=["half-small", "half-large", "whole-large"],
)
def test_the_end_of_a_process_is_no_abort(storage: Storage, reading: str, whole_bytes: int) -> None:
    arguments = [storage.url, json.dumps(storage.options), str(whole_bytes), reading]
    for _ in range(2):
        ended = subprocess.run(
            [sys.executable, "-c", READ, *arguments], capture_output=True, text=True, timeout=120, check=False
        )
        assert (ended.returncode, ended.stderr) == (0, "")
        assert int(ended.stdout) == (1000 * FILES if reading == "whole" else 1000)


def test_columns_of_large_files_are_read_apart(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaudi_batch.storage.arrow.WHOLE_BYTES", 0)
    paths = [storage.full(name) for name in storage.names("")]
    dataset = ds.dataset(paths, filesystem=arrow_filesystem(storage.filesystem), format="parquet")
    assert dataset.count_rows() == 1000 * FILES
    assert dataset.to_table(columns=["row"], filter=ds.field("prompt") == "prompt 7").column("row").to_pylist() == (
        [7] * FILES
    )
