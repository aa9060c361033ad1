"""The record of an export: what it is and how it is packed. It stands in the destination before the first image."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gaudi_batch.errors import InputError
from gaudi_batch.export.plan import Cuts
from gaudi_batch.storage.store import Storage

RECORD = ".gaudi-batch/export.json"
"""Where it lies, hidden from loaders."""
SETTLE_S = 1.0
"""Seconds after which a record that was put in a store is looked at again."""


def digest(request: Mapping[str, Any], images: Iterable[Sequence[str | None]]) -> str:
    """The digest of an export.

    Args:
        request: what decides how images are written.
        images: of each what decides which it is, and where it goes.
    """
    hasher = hashlib.sha256(json.dumps(request).encode())
    for image in images:
        hasher.update(json.dumps(image).encode())
    return hasher.hexdigest()


def digest_of(record: bytes) -> str | None:
    """The digest in a record; None if it is no record."""
    try:
        return str(json.loads(record)["digest"])
    except (ValueError, KeyError, TypeError):
        return None


def cuts_of(record: bytes | None, digest: str) -> Cuts | None:
    """How an export that has begun is packed; None if the record is that of another, or there is none."""
    return json.loads(record).get("cuts") if record is not None and digest_of(record) == digest else None


def difference(record: bytes, digest: str, cuts: Cuts) -> str | None:
    """What another record says of a place for an export, as a part of a sentence; None if it is this export's.

    Args:
        record: that is there.
        digest: of the export.
        cuts: of the export.
    """
    if digest_of(record) != digest:
        return "another export: this one differs in images, names, splits, format or packing"
    if cuts_of(record, digest) != cuts:
        return "this export, packed in another way"
    return None


def put_record(target: Storage, record: Mapping[str, Any]) -> None:
    """Puts the record of an export in its destination, unless it is there.

    Args:
        target: the destination.
        record: with its digest and its cuts.

    Raises:
        InputError: the destination holds something else.
        StorageError: storage failed.
    """
    data = target.get(RECORD)
    if data is None:
        if names := target.names(""):
            raise InputError(
                f"{target.url} holds something else, {names[0]!r}; name a place that is empty or not there"
            )
        target.put(RECORD, (json.dumps(record, indent=1) + "\n").encode())
        # Another may have begun at the same moment; the record that is there now decides for both.
        time.sleep(0.0 if target.local else SETTLE_S)
        put_record(target, record)
        return
    if told := difference(data, record["digest"], record["cuts"]):
        raise InputError(f"{target.url} holds {told}; name another place, or remove what is there")
