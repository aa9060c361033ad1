"""A model hub for tests: what huggingface_hub and diffusers ask of the real one, for one repository."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from helpers import REPOSITORY, answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = REPOSITORY / "gaudi_batch/models/shapes"
READY_TIMEOUT_S = 120.0


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
        self.ready: Callable[[], bool] = lambda: True
        """Weights are not sent before."""
        self.fetched: Counter[str] = Counter()
        self.requests = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address, as HF_ENDPOINT has it."""
        return f"http://127.0.0.1:{self.server_port}"

    def weights(self) -> dict[str, int]:
        """How often each file of weights was fetched."""
        return {name: count for name, count in self.fetched.items() if name.endswith(".safetensors")}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        with self.server.lock:
            self.server.requests += 1
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
            until = time.monotonic() + READY_TIMEOUT_S
            while name.endswith(".safetensors") and not self.server.ready() and time.monotonic() < until:
                time.sleep(0.05)
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


@functools.cache
def _etag(file: Path) -> str:
    """The SHA-256 of weights, the hash that git gives another file."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hub_served() -> contextlib.AbstractContextManager[Hub]:
    """A hub that answers meanwhile."""
    return answering(Hub())
