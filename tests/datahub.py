"""A hub of datasets for tests: what huggingface_hub and datasets ask of the real one for one repository, with commits
and the protocol of Git LFS."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from helpers import answering

OF_LFS = (".parquet", ".tar", ".png", ".jpg")
REPOSITORY = "tests/images"


class DataHub(ThreadingHTTPServer):
    """The hub, with the repository `tests/images`, which is not there until it is made, or has files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.exists = False
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        """Large files that were put, by SHA-256, committed or not."""
        self.puts: Counter[str] = Counter()
        """How often each was put whole."""
        self.commits: list[list[str]] = []
        """The paths of each commit."""
        self.private = False
        self.refuses = False
        """Whether all that would change it is forbidden."""
        self.statuses: Callable[[str], int | None] = lambda path: None
        """Called with the path of each POST; a status that it returns is the answer."""
        self.before_put: Callable[[str], None] = lambda oid: None
        """Called when a large file comes, before it is taken."""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address, as HF_ENDPOINT has it."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def head(self) -> str:
        """The newest commit."""
        every = [len(self.commits), *sorted(self.files.items())]
        return hashlib.sha1(repr(every).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DataHub

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        hub = self.server
        if re.fullmatch(rf"/api/datasets/{REPOSITORY}(/revision/[\w/]+)?", path) and hub.exists:
            siblings = [{"rfilename": name} for name in sorted(hub.files)]
            self._json({"id": REPOSITORY, "sha": hub.head, "siblings": siblings, "private": hub.private, "tags": []})
        elif match := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/\w+(?:/(.*))?", path):
            self._tree(match[1] or "")
        elif match := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/\w+/(.+)", path):
            self._file(match[1])
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        if status := hub.statuses(path):
            self._answer(b"", {}, status)
        elif path == "/api/repos/create":
            self._json({"url": f"{hub.url}/datasets/{REPOSITORY}"}, 409 if hub.exists else 200)
            hub.private = hub.private if hub.exists else bool(json.loads(body).get("private"))
            hub.exists = True
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif hub.refuses:
            self._answer(b"", {"X-Error-Message": "You have no access"}, 403)
        elif path == f"/api/datasets/{REPOSITORY}/preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": _mode(path), **self._known(path)} for path in paths]})
        elif path == f"/datasets/{REPOSITORY}.git/info/lfs/objects/batch":
            self._json({"objects": [self._lfs(wanted) for wanted in json.loads(body)["objects"]]})
        elif path == "/lfs/verify":
            self._json({})
        elif path == f"/api/datasets/{REPOSITORY}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        elif path == f"/api/datasets/{REPOSITORY}/paths-info/main" or "/paths-info/" in path:
            names = json.loads(body)["paths"] if body[:1] == b"{" else re.findall(r"paths=([^&]+)", body.decode())
            self._json([entry for name in map(unquote, names) if (entry := self._entry(name)) is not None])
        else:
            self._missing("RepoNotFound")

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        self.server.before_put(oid)
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == oid
        with self.server.lock:
            self.server.objects[oid] = data
            self.server.puts[oid] += 1
        self._json({})

    def _known(self, path: str) -> dict[str, Any]:
        data = self.server.files.get(path)
        oid = None if data is None else hashlib.sha256(data).hexdigest() if _mode(path) == "lfs" else _git_hash(data)
        return {"shouldIgnore": False, "oid": oid}

    def _lfs(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.objects:
            return wanted
        actions = {
            "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
            "verify": {"href": f"{self.server.url}/lfs/verify"},
        }
        return {**wanted, "actions": actions}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.server
        with hub.lock:
            expected = lines[0]["value"].get("parentCommit")
            if expected not in (None, hub.head):
                self._answer(b"", {"X-Error-Message": "A commit has happened since"}, 412)
                return
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            hub.commits.append([line["value"]["path"] for line in lines if line["key"] != "header"])
        url = f"{hub.url}/datasets/{REPOSITORY}/commit/{hub.head}"
        self._json({"success": True, "commitOid": hub.head, "commitUrl": url})

    def _tree(self, directory: str) -> None:
        names = [name for name in sorted(self.server.files) if not directory or f"{name}/".startswith(f"{directory}/")]
        if directory and not names:
            self._missing("EntryNotFound")
            return
        below = {name: name[len(directory) :].lstrip("/") for name in names}
        if "recursive=true" in self.path.lower():
            paths = names + sorted({name.rpartition("/")[0] for name in names if "/" in below[name]})
        else:
            paths = sorted({f"{directory}/{rest.partition('/')[0]}".lstrip("/") for rest in below.values()})
        self._json([entry for path in paths if (entry := self._entry(path)) is not None])

    def _entry(self, path: str) -> dict[str, Any] | None:
        data = self.server.files.get(path)
        if data is not None:
            entry = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
            if _mode(path) == "lfs":
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            return entry
        if any(name.startswith(f"{path}/") for name in self.server.files):
            return {"type": "directory", "path": path, "oid": "0" * 40}
        return None

    def _file(self, name: str) -> None:
        data = self.server.files.get(name)
        if data is None:
            self._missing("EntryNotFound")
            return
        headers = {"ETag": f'"{_git_hash(data)}"', "X-Repo-Commit": self.server.head, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            self._answer(data[start:stop], headers, 206)
        else:
            self._answer(data, headers)

    def _missing(self, code: str) -> None:
        self._answer(b"", {"X-Error-Code": code}, 404)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _answer(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _mode(path: str) -> str:
    return "lfs" if path.endswith(OF_LFS) else "regular"


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def datahub_served() -> contextlib.AbstractContextManager[DataHub]:
    """A hub that answers meanwhile."""
    return answering(DataHub())
