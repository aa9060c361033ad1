"""What several test files use and is no fixture."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
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


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@dataclass
class S3Server:
    """A real S3 server on this machine, with one bucket named `bucket`: JuiceFS's gateway, which carries MinIO's."""

    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def options(self) -> dict[str, Any]:
        """fsspec storage options."""
        return self.options_at(self.port)

    def options_at(self, port: int) -> dict[str, Any]:
        """The same for somebody who stands before it on another port."""
        return {
            "key": "tester-key-id",
            "secret": "tester-password",
            "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"},
        }

    def start(self) -> None:
        """Starts the server on what it has stored so far, and waits until it answers."""
        juicefs = str(Path(sys.executable).parent / "juicefs")
        meta = f"sqlite3://{self.home}/meta.db"
        if not (self.home / "meta.db").exists():
            bucket = ["--storage", "file", "--bucket", f"{self.home}/data", "--trash-days", "0"]
            subprocess.run([juicefs, "format", *bucket, meta, "test"], check=True, capture_output=True)
        options = ["--multi-buckets", "--no-banner", "--metrics", "127.0.0.1:0", "--cache-dir", f"{self.home}/cache"]
        self.process = subprocess.Popen(
            [juicefs, "gateway", *options, meta, f"127.0.0.1:{self.port}"],
            env=os.environ | {"MINIO_ROOT_USER": "tester-key-id", "MINIO_ROOT_PASSWORD": "tester-password"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(300):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.1)

    def make_bucket(self) -> None:
        """Makes the bucket, once the server is up."""
        import s3fs

        filesystem = s3fs.S3FileSystem(**self.options, skip_instance_cache=True)
        for _ in range(100):
            with contextlib.suppress(OSError):
                filesystem.mkdir("bucket")
                return
            time.sleep(0.2)
        raise RuntimeError("the S3 server does not answer")

    def kill(self) -> None:
        """Kills the server with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
