"""What several test files use and is no fixture."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def read_manifest(output: Path) -> list[dict[str, Any]]:
    """All rows of a run's joined manifest."""
    rows: list[dict[str, Any]] = pq.read_table(output / "manifest.parquet").to_pylist()
    return rows


def command_line(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `gaudi-batch` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gaudi_batch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | environment,
        check=False,
    )


def put_into_hub_cache(cache: Path, name: str, files: Path, revision: str = "main") -> str:
    """Puts a folder where huggingface_hub keeps what it has fetched; returns its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(files, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
    return commit


@dataclass(frozen=True)
class S3Server:
    """A real S3 server on this machine, with one bucket named `bucket`."""

    port: int

    @property
    def options(self) -> dict[str, Any]:
        """fsspec storage options."""
        return {
            "key": "tester",
            "secret": "tester-password",
            "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{self.port}", "region_name": "us-east-1"},
        }
