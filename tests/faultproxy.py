"""A reverse proxy that stands before a real server and makes of its answers what networks and stores make of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLOW_BYTES_PER_S = 2e6
DELAY_S = 3.0


@dataclass
class Fault:
    """What befalls requests that match.

    Args:
        kind: a status to answer with; `reset` drops the connection before the server hears of it, `lost answer`
            afterwards; `cut` drops it amid the answer's body; `stall` takes the request and never answers;
            `deaf` does not even read its body; `late` lets the server have it when the proxy is cleared; `slow` takes
            its body, and gives that of the answer, at `SLOW_BYTES_PER_S`; `delayed` is answered `delay_s` seconds
            later; `kill client` ends the process that asks, if that is a card.
        method: pattern of the method.
        path: pattern of the path with its query, found anywhere in it.
        count: how many requests; None is all.
        every: only each so many-th of them.
        when: whether it is time yet.
        code: the store's code of the error, for a status.
        first_byte: where the range of a read must begin.
        client: whether it befalls what comes from a port of this machine.
        anonymous: whether it befalls only what comes without credentials.
        delay_s: of what is delayed.
        over: set when one that was late has been answered.
    """

    kind: str
    method: str = ""
    path: str = ""
    count: int | None = None
    every: int = 1
    when: Callable[[], bool] = lambda: True
    code: str = "InternalError"
    message: str = "Made by the proxy."
    first_byte: range | None = None
    client: Callable[[int], bool] = lambda port: True
    anonymous: bool = False
    delay_s: float = DELAY_S
    hits: int = 0
    seen: int = 0
    over: threading.Event = field(default_factory=threading.Event)


class FaultProxy(ThreadingHTTPServer):
    """Forwards to a port of this machine. The Host header stays, so signatures stay valid."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.requests: list[str] = []
        """What was asked for, as `PUT /bucket/object`."""
        self.over = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.RLock()  # `when` may ask

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Lets everything through, and lets go of what is stalled."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()
            self._let_go()

    def remove(self, fault: Fault) -> None:
        """Ends one fault, and lets go of what is stalled."""
        with self._lock:
            self._faults = [other for other in self._faults if other is not fault]
            self._let_go()

    def _let_go(self) -> None:
        self.over.set()
        self.over = threading.Event()

    def asked(self, pattern: str) -> int:
        """How many requests there were of a pattern."""
        with self._lock:
            return sum(bool(re.search(pattern, request)) for request in self.requests)

    def fault_of(self, method: str, path: str, port: int, first_byte: int, signed: bool) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for fault in self._faults:
                if fault.count is not None and fault.hits >= fault.count:
                    continue
                if not (re.search(fault.method, method) and re.search(fault.path, path) and fault.when()):
                    continue
                if fault.first_byte is not None and first_byte not in fault.first_byte:
                    continue
                if not fault.client(port) or (fault.anonymous and signed):
                    continue
                fault.seen += 1
                if fault.seen % fault.every == 0:
                    fault.hits += 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def do_GET(self) -> None:
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        port = self.client_address[1]
        signed = "Authorization" in self.headers
        fault = self.server.fault_of(self.command, self.path, port, int(asked[1]) if asked else -1, signed)
        kind = fault.kind if fault else ""
        if kind == "kill client" and not kill_card_at(port):
            kind = ""
        if kind == "deaf":
            self._stall()
            return
        over = self.server.over
        body = self._body(_bytes_per_s(kind))
        if fault and kind == "delayed":
            over.wait(fault.delay_s)
        if kind == "stall":
            self._stall()
        elif kind in ("reset", "kill client"):
            self._reset()
        elif fault and kind.isdigit():
            google = "/storage/v1/" in self.path
            headers = [("Content-Type", "application/json" if google else "application/xml")]
            headers += [("x-ms-error-code", fault.code)]
            self._answer(int(kind), "", headers, _json(fault) if google else _xml(fault))
        elif fault and kind == "late":
            over.wait()
            self._forward(body, kind)
            fault.over.set()
        else:
            self._forward(body, kind)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self, body: bytes, kind: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "transfer-encoding", "connection", "content-length"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
        except OSError:
            self._reset()  # the server is not there: what a client without the proxy would see, nearly
            return
        finally:
            connection.close()
        if kind in ("lost answer", "late"):
            self._reset()
            return
        self._answer(response.status, response.reason, response.getheaders(), data, kind)

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], data: bytes, kind: str = "") -> None:
        self.send_response_only(status, reason or None)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", lengths[0] if self.command == "HEAD" and lengths else str(len(data)))
        self.end_headers()
        if kind == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self._reset()
        elif self.command != "HEAD":
            for start in range(0, len(data), 1 << 16):
                self.wfile.write(data[start : start + (1 << 16)])
                time.sleep((1 << 16) / _bytes_per_s(kind))

    def _body(self, bytes_per_s: float) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            body, size = b"", int(self.headers.get("Content-Length", 0))
            while part := self.rfile.read(min(size - len(body), 1 << 16)):
                body += part
                time.sleep(len(part) / bytes_per_s)
            return body
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _stall(self) -> None:
        self.server.over.wait()
        self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()  # the socket is closed when nobody holds it
            self.connection.close()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def kill_card_at(port: int) -> bool:
    """Kills the card's process that is connected from a port of this machine; returns whether there is one."""
    card = card_at(port)
    if card is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(card, signal.SIGKILL)
    return True


def card_at(port: int) -> int | None:
    """The card's process that is connected from a port of this machine."""
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{line[9]}]" for line in table if int(line[1].rpartition(":")[2], 16) == port}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if not process.joinpath("cmdline").read_bytes().startswith(b"ray::Card"):
                continue
            if any(str(link.readlink()) in sockets for link in process.joinpath("fd").iterdir()):
                return int(process.name)
    return None


def _bytes_per_s(kind: str) -> float:
    return SLOW_BYTES_PER_S if kind == "slow" else math.inf


def _json(fault: Fault) -> bytes:
    error = {"code": int(fault.kind), "message": fault.message, "errors": [{"reason": fault.code}]}
    return json.dumps({"error": error}).encode()


def _xml(fault: Fault) -> bytes:
    error = f"<Code>{fault.code}</Code><Message>{fault.message}</Message>"
    return f'<?xml version="1.0" encoding="UTF-8"?><Error>{error}<RequestId>1</RequestId></Error>'.encode()


@contextlib.contextmanager
def fault_proxy(upstream: int) -> Iterator[FaultProxy]:
    """Runs a proxy in a thread."""
    proxy = FaultProxy(upstream)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.clear()
        proxy.shutdown()
        proxy.server_close()
