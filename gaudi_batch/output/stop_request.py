"""stop.json: a request to stop a submitted job within a grace of another length than its own.

It names the submission, so that it stops no other driver, and the driver removes it.
"""

from __future__ import annotations

import contextlib
import json
import math

from gaudi_batch.errors import InputError
from gaudi_batch.layout import STOP_FILE
from gaudi_batch.storage.store import Storage


def put_request(storage: Storage, submission: str, grace: float) -> None:
    """Asks the driver of a submission to stop.

    Args:
        storage: the output.
        submission: what the request is marked with.
        grace: seconds in which what has begun is committed.

    Raises:
        InputError: no run is in the output.
        StorageError: storage failed.
    """
    if storage.get("run.json") is None:
        raise InputError(f"{storage.url}: no run is there, as seen from here")
    storage.put(STOP_FILE, json.dumps({"submission": submission, "grace": grace}).encode())


def requested_grace(data: bytes | None, submission: str | None) -> float | None:
    """The grace of a request to a submission, in seconds; None if there is no request to it.

    Args:
        data: of the object, None where there is none.
        submission: the submission.
    """
    with contextlib.suppress(Exception):  # others may have written anything there
        request = json.loads(data or b"null")
        if request.get("submission") == submission and 0 <= float(request["grace"]) < math.inf:
            return float(request["grace"])
    return None
