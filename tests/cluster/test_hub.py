"""A model that comes from a hub: many cards of a node ask for it at the same moment, and it is fetched once."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY, command_line, read_manifest

pytestmark = pytest.mark.torch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = REPOSITORY / "gaudi_batch/models/shapes"


class Hub(ThreadingHTTPServer):
    """The part of a model hub that is asked for: one repository, `tests/shapes`, with the built-in model."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {
            path.relative_to(MODEL).as_posix(): path
            for path in MODEL.rglob("*")
            if path.suffix in (".json", ".txt", ".safetensors")
        }
        self.fetched: Counter[str] = Counter()
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch(r"/api/models/tests/shapes(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._answer(json.dumps({"id": "tests/shapes", "sha": COMMIT, "siblings": siblings}).encode())
        elif re.fullmatch(r"/api/models/tests/shapes/tree/\w+", path):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                for name, file in self.server.files.items()
            ]
            self._answer(json.dumps(entries).encode())
        elif match := re.fullmatch(r"/tests/shapes/resolve/\w+/(.+)", path):
            self._file(match[1])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        file = self.server.files.get(name)
        if file is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.command == "GET":
            with self.server.lock:
                self.server.fetched[name] += 1
        self._answer(file.read_bytes(), {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})

    def _answer(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_cards_that_start_together_fetch_a_model_once(hub: Hub, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a large red circle on a blue background"] * 12}), prompts)
    job = ("--prompts", prompts, "--output", tmp_path / "out", "--device", "cpu", "--cards", "2", "--steps", "2")
    result = command_line(
        *("run", *job, "--model", "tests/shapes", "--batch-size", "2", "--shard-size", "2", "--cpu.threads", "1"),
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_HOME=str(tmp_path / "hf"),
    )
    assert result.returncode == 0, result.stderr
    assert len(read_manifest(tmp_path / "out")) == 12
    assert json.loads((tmp_path / "out/run.json").read_text())["fingerprint"]["model_revision"] == COMMIT
    weights = {name: count for name, count in hub.fetched.items() if name.endswith(".safetensors")}
    assert len(weights) == 3
    assert set(weights.values()) == {1}, "weights were fetched more than once"
