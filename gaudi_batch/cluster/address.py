"""Which cluster a job is for, and whether this machine can stand in for one."""

from __future__ import annotations

import os
import socket
import sys

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError
from gaudi_batch.pipelines.gaudi_environment import require_stack
from gaudi_batch.redaction import redact

REACH_TIMEOUT_S = 10.0
"""Seconds that a connection to the cluster's head may take, before Ray, which waits for minutes, is asked for one."""


def refuse_without_stack(config: JobConfig, address: str | None) -> None:
    """Raises InputError if a Ray of this machine would have HPU cards that this Python can't use."""
    if config.device == "hpu" and not is_cluster(address):
        try:
            require_stack(config.gaudi.mode)
        except RuntimeError as error:
            raise InputError(f"device hpu: {error}") from None


def is_cluster(address: str | None) -> bool:
    """Whether an address, as `address_of` returns it, is a cluster's and not this machine's."""
    ray = sys.modules.get("ray")
    return address not in (None, "local") or (ray is not None and ray.is_initialized())


def address_of(address: str | None) -> str | None:
    """The cluster's address: the one given, else RAY_ADDRESS, else None for this machine.

    Raises:
        InputError: it is named by a URL, as the Jobs API and Ray's client are, or by IPv6 without brackets.
    """
    name, meant = ("--address", address) if address else ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS"))
    if meant and "://" in meant:
        raise InputError(
            f"{name} {redact(meant)!r}: a run begins on the cluster, at its head's own address, as in head:6379; from"
            " elsewhere use gaudi-batch submit --address http://head:8265"
        )
    if meant and meant.count(":") > 1 and not meant.startswith("["):
        raise InputError(f"{name} {meant!r}: an address of IPv6 is written in brackets, as in [::1]:6379")
    return meant or None


def check_reachable(address: str) -> None:
    """Raises InputError if nothing listens at the address; Ray itself takes minutes to say so."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
        except OSError as error:
            raise InputError(f"no Ray cluster answers at {address!r}: {error}") from None
