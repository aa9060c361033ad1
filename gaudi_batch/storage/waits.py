"""Log lines about long waits: what is waited for, and whether the network does not answer."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

FIRST_LINE_S = 3.0
"""Seconds until a wait is logged."""
WAIT_LINE_INTERVAL_S = 30.0
"""Seconds between two lines about a wait."""
CONNECT_TIMEOUT_S = 10.0
"""Seconds that a connection to a host may take before the network is said not to lead there."""
PORTS = {"https": 443, "http": 80}


@contextlib.contextmanager
def told_if_slow(what: Callable[[], str]) -> Iterator[None]:
    """Logs what is waited for if it takes long.

    Args:
        what: says it, in one line; called in another thread.
    """
    over = threading.Event()

    def tell() -> None:
        seconds = FIRST_LINE_S
        while not over.wait(seconds):
            log.warning("%s", what())
            seconds = WAIT_LINE_INTERVAL_S

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def out_of_reach(url: str) -> str | None:
    """Why the network does not reach the host of an http(s) or hf URL; None if it does, or if that can't be told, as
    behind a proxy."""
    if url.startswith("hf://"):
        from huggingface_hub.constants import ENDPOINT

        url = ENDPOINT
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in PORTS or parts.hostname is None or urllib.request.getproxies().get(parts.scheme):
        return None
    try:
        port = parts.port or PORTS[parts.scheme]
        socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return f"the network does not lead to {parts.hostname}: {error}"
    return None
