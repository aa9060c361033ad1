"""A small job on any store: its prompts, a run of it in this process, and what it made."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gaudi_batch.cli import main as cli
from gaudi_batch.storage.store import Storage

ROWS = 48
SHARDS = 7
"""Of 8 rows, in files of 20 and 28 rows."""
Content = list[tuple[Any, ...]]


def write_dataset(directory: Path) -> None:
    """Two files with several row groups; one row can't be run."""
    texts = [None if row == 13 else f"prompt {row}" for row in range(ROWS)]
    for number, (start, stop) in enumerate([(0, 20), (20, ROWS)]):
        table = pa.table({"prompt": texts[start:stop], "topic": [f"topic {row}" for row in range(start, stop)]})
        pq.write_table(table, directory / f"{number}.parquet", row_group_size=8)


def a_job(prompts: Path | str, output: Path | str, **fields: Any) -> dict[str, Any]:
    """The job, as in a job file."""
    return {
        "prompts": str(prompts),
        "output": str(output),
        "device": "simulated",
        "simulated": {"batch_seconds": 0.02},
        "shard_size": 8,
        "batch_size": 4,
        "cards": 2,
        **fields,
    }


def run(prompts: Path | str, output: Path | str, **fields: Any) -> int:
    """Runs the job by the command line, in this process; returns its exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(a_job(prompts, output, **fields), file)
        file.flush()
        return cli.main(["run", file.name])


def content(output: Storage) -> Content:
    """What a run's manifest says was made; every image is there and is what it says."""
    data = output.get("manifest.parquet")
    assert data is not None
    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    for row in rows:
        if row["status"] == "ok":
            assert hashlib.sha256(output.get(row["path"]) or b"").hexdigest() == row["sha256"]
    return sorted(
        (row["row"], row["image_index"], row["id"], row["status"], row["error"], row["sha256"]) for row in rows
    )


def nothing_was_held_against_cards(output: Storage) -> None:
    summary = json.loads(output.get("summary.json") or b"{}")
    assert summary["retries"] == 0
    assert [card["faults"] for card in summary["cards"].values()] == [0] * len(summary["cards"])


def said_once(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The last line on standard error says why, and there is no traceback; returns it."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors, errors
    last = errors.rstrip().rsplit("\n", 1)[-1]
    for word in words:
        assert word in last, errors
    return last
