"""Serves a directory as an S3 bucket, each request after a fixed latency, to measure what a store far away costs.

    python benchmarks/directory_s3.py /tmp/large --port 9123 --latency-ms 20

The bucket is named `bucket`, and any credentials do. It lists hundreds of thousands of objects at a page's cost, which
the S3 servers of the tests do not. It knows what fsspec's S3 asks for: lists, reads with ranges, writes, also in parts
and on condition that nothing is there, and removal. It is one process of Python, so its own CPU time, a millisecond or
two a request, is on top of the latency.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import hashlib
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"
PAGE = 1000
"""Objects of a page at most, as S3 has it."""


class DirectoryBucket(ThreadingHTTPServer):
    """A bucket whose objects are the files of a directory.

    Args:
        root: the directory.
        port: of this machine; 0 takes a free one.
        latency_s: seconds before each request is looked at.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, root: Path, port: int = 0, latency_s: float = 0.0) -> None:
        self.root, self.latency_s = root, latency_s
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        """How many there were, by method, `LIST` among them."""
        self.uploads: dict[str, dict[int, bytes]] = {}
        """Parts by number, of each upload that is not complete."""
        self.sent: Counter[str] = Counter()
        """Bytes sent of each object."""
        self.objects = dict(self._files(root, ""))
        """Size and time of the last change by key."""
        self.keys = sorted(self.objects)
        super().__init__(("127.0.0.1", port), _Handler)

    def _files(self, directory: Path, prefix: str) -> Any:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir():
                    yield from self._files(directory / entry.name, f"{prefix}{entry.name}/")
                else:
                    stat = entry.stat()
                    yield prefix + entry.name, (stat.st_size, stat.st_mtime_ns)

    def path(self, key: str) -> Path:
        """The file of an object."""
        return self.root / key

    def add(self, key: str, data: bytes, only_new: bool) -> bool:
        """Writes an object; returns whether it did."""
        with self.lock:
            if only_new and key in self.objects:
                return False
            if key not in self.objects:
                bisect.insort(self.keys, key)
            path = self.path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.objects[key] = (len(data), path.stat().st_mtime_ns)
        return True

    def remove(self, key: str) -> None:
        """Removes an object, if it is there."""
        with self.lock:
            if self.objects.pop(key, None) is not None:
                del self.keys[bisect.bisect_left(self.keys, key)]
                self.path(key).unlink()

    def page(self, prefix: str, delimiter: str, after: str, most: int) -> tuple[list[str], list[str], str]:
        """Keys, common prefixes, and the last of both if there is more."""
        keys: list[str] = []
        folders: list[str] = []
        with self.lock:
            at = max(bisect.bisect_left(self.keys, prefix), bisect.bisect_right(self.keys, after) if after else 0)
            while at < len(self.keys) and (key := self.keys[at]).startswith(prefix):
                if len(keys) + len(folders) == most:
                    return keys, folders, max(keys[-1:] + folders[-1:])
                cut = key.find(delimiter, len(prefix)) if delimiter else -1
                if cut < 0:
                    keys.append(key)
                    at += 1
                else:
                    folder = key[: cut + 1]
                    if folder > after or not after.startswith(folder):
                        folders.append(folder)
                    at = bisect.bisect_left(self.keys, folder[:-1] + chr(ord(delimiter) + 1))
        return keys, folders, ""


@contextlib.contextmanager
def bucket_served(root: Path) -> Iterator[tuple[DirectoryBucket, dict[str, Any]]]:
    """Serves a directory from a thread of this process; with the storage options by which it is reached."""
    server = DirectoryBucket(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region_name": "us-east-1"}
    try:
        yield server, {"key": "any", "secret": "any", "client_kwargs": endpoint}
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DirectoryBucket

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def _begin(self) -> tuple[str, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self._body()
        time.sleep(self.server.latency_s)
        kind = "LIST" if "list-type" in query else self.command
        with self.server.lock:
            self.server.requests[kind] += 1
        return unquote(parts.path)[len(BUCKET) + 2 :], query, body

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raise ValueError("bodies have a length here")
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        whole, rest = b"", data
        while rest:
            head, _, rest = rest.partition(b"\r\n")
            size = int(head.split(b";")[0] or b"0", 16)
            if not size:
                break
            whole, rest = whole + rest[:size], rest[size + 2 :]
        return whole

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _etag(self, key: str) -> str:
        size, changed = self.server.objects[key]
        return f'"{hashlib.md5(f"{key} {size} {changed}".encode(), usedforsecurity=False).hexdigest()}-1"'

    def do_HEAD(self) -> None:
        """HeadObject or HeadBucket."""
        key, _, _ = self._begin()
        if not key:
            self._answer(200)
        elif key in self.server.objects:
            size, changed = self.server.objects[key]
            self._answer(
                200,
                Content_Length=str(size),
                ETag=self._etag(key),
                Last_Modified=formatdate(changed / 1e9, usegmt=True),
            )
        else:
            self._answer(404)

    def do_GET(self) -> None:
        """GetObject or ListObjectsV2."""
        key, query, _ = self._begin()
        if not key:
            self._list(query)
            return
        if key not in self.server.objects:
            self._error(404, "NoSuchKey")
            return
        changed = self.server.objects[key][1]
        about = {"ETag": self._etag(key), "Last_Modified": formatdate(changed / 1e9, usegmt=True)}
        data = self.server.path(key).read_bytes()
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if match:
            first = int(match[1]) if match[1] else max(0, len(data) - int(match[2]))
            last = min(int(match[2]) if match[1] and match[2] else len(data) - 1, len(data) - 1)
            about["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        with self.server.lock:
            self.server.sent[key] += len(data)
        self._answer(status, data, **about)

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(int(query.get("max-keys") or PAGE), PAGE)
        after = query.get("continuation-token") or query.get("start-after", "")
        keys, folders, last = self.server.page(prefix, delimiter, after, most)
        entries = []
        for key in keys:
            size, changed = self.server.objects[key]
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed / 1e9))
            entries.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                f"<ETag>{escape(self._etag(key))}</ETag><Size>{size}</Size></Contents>"
            )
        entries += [f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in folders]
        more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if last else ""
        head = f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(keys) + len(folders)}</KeyCount>"
        cut = f"<MaxKeys>{most}</MaxKeys><IsTruncated>{str(bool(last)).lower()}</IsTruncated>{more}"
        self._answer(
            200, f'<?xml version="1.0"?><ListBucketResult>{head}{cut}{"".join(entries)}</ListBucketResult>'.encode()
        )

    def do_PUT(self) -> None:
        """PutObject or UploadPart."""
        key, query, body = self._begin()
        if "uploadId" in query:
            with self.server.lock:
                self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
            self._answer(200, ETag=f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
            return
        self._store(key, body)

    def _store(self, key: str, body: bytes, answer: bytes = b"") -> None:
        if self.server.add(key, body, only_new=self.headers.get("If-None-Match") == "*"):
            self._answer(200, answer, ETag=self._etag(key))
        else:
            self._error(412, "PreconditionFailed")

    def do_POST(self) -> None:
        """DeleteObjects, CreateMultipartUpload or CompleteMultipartUpload."""
        key, query, body = self._begin()
        if "delete" in query:
            names = [unquote(name) for name in re.findall(r"<Key>(.*?)</Key>", body.decode())]
            for name in names:
                self.server.remove(name)
            gone = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
            self._answer(200, f"<DeleteResult>{gone}</DeleteResult>".encode())
        elif "uploads" in query:
            upload = secrets.token_hex(8)
            with self.server.lock:
                self.server.uploads[upload] = {}
            upload_xml = f"<Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key><UploadId>{upload}</UploadId>"
            self._answer(200, f"<InitiateMultipartUploadResult>{upload_xml}</InitiateMultipartUploadResult>".encode())
        else:
            parts = self.server.uploads.pop(query["uploadId"])
            done = f"<CompleteMultipartUploadResult><Key>{escape(key)}</Key></CompleteMultipartUploadResult>"
            self._store(key, b"".join(parts[number] for number in sorted(parts)), done.encode())

    def do_DELETE(self) -> None:
        """DeleteObject or AbortMultipartUpload."""
        key, query, _ = self._begin()
        if "uploadId" in query:
            self.server.uploads.pop(query["uploadId"], None)
        else:
            self.server.remove(key)
        self._answer(204)


def main() -> None:
    """Serves a directory until it is interrupted, then says what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    arguments = parser.parse_args()
    server = DirectoryBucket(arguments.directory, arguments.port, arguments.latency_ms / 1000)
    print(f"http://127.0.0.1:{server.server_port}/{BUCKET}: {len(server.keys)} objects", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
    print(f"requests {dict(server.requests)}, {server.sent.total()} bytes of objects sent", flush=True)


if __name__ == "__main__":
    main()
