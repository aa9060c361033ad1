"""Stopping a submitted job: what will happen, and how the word gets to its driver.

The Jobs API ends a job by SIGTERM, which carries no number, and by SIGKILL after the time that was set when the job was
submitted. So a grace of another length goes by an object in the output, which the job's driver looks for. It names
the submission, so that it stops no other driver, and the driver removes it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gaudi_batch.errors import GaudiBatchError, InputError, StorageError
from gaudi_batch.layout import STOP_FILE
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.reporting.status import read_status
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import duration

SUBMISSION_VARIABLE = "GAUDI_BATCH_SUBMISSION"
"""In the environment of a submitted job: what a request to stop it is marked with."""
LOOK_SECONDS = 3.0
"""How often a driver looks for a request."""
PATIENCE_SECONDS = 10.0


@contextlib.contextmanager
def watched_for_stop(storage: Storage, stop: Callable[[float], None]) -> Iterator[None]:
    """Looks for requests to stop this process's submission; none where it is no submitted job.

    Args:
        storage: the output.
        stop: called in another thread with the grace that a request gives, in seconds.
    """
    submission, over = os.environ.get(SUBMISSION_VARIABLE), threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            with contextlib.suppress(StorageError, RuntimeError):  # the latter of a loop that has just ended
                grace = _grace(storage.once().get(STOP_FILE), submission)
                if grace is not None:
                    stop(grace)
                    storage.once().remove(STOP_FILE)

    if submission:
        threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _grace(data: bytes | None, submission: str | None) -> float | None:
    with contextlib.suppress(Exception):  # whatever somebody has put there
        found = json.loads(data or b"null")
        if found.get("submission") == submission and 0 <= float(found["grace"]) < math.inf:
            return float(found["grace"])
    return None


@dataclass(frozen=True)
class Submitted:
    """What the cluster keeps of a job that was submitted."""

    submission: str
    output: str
    storage_options: Mapping[str, Any]
    grace: float
    """Its own, in seconds."""

    def metadata(self) -> dict[str, str]:
        """As the Jobs API keeps it."""
        return {
            "gaudi_batch": self.submission,
            "output": self.output,
            "storage_options": json.dumps(dict(self.storage_options)),
            "grace": f"{self.grace:g}",
        }

    @classmethod
    def read(cls, metadata: Mapping[str, str] | None) -> Submitted | None:
        """From what the Jobs API has kept; None if that is of an older version, or of no submission of ours."""
        try:
            found = dict(metadata or {})
            options = json.loads(found["storage_options"])
            return cls(found["gaudi_batch"], found["output"], dict(options), float(found["grace"]))
        except (KeyError, ValueError, TypeError):
            return None

    def ask_to_stop(self, grace: float) -> None:
        """Puts a request into the output. Raises InputError."""
        data = json.dumps({"submission": self.submission, "grace": grace}).encode()
        try:
            storage = self._storage()
            if storage.get("run.json") is None:
                raise InputError(f"{storage.url}: no run is there, as seen from here")
            storage.put(STOP_FILE, data)
        except GaudiBatchError as error:
            raise InputError(
                f"--grace goes by the job's output, which can't be written from here: {error}; without it the job's own"
                f" grace of {self.grace:g} s holds"
            ) from None

    def outlook(self, grace: float) -> str:
        """What stopping will do, in one sentence."""
        said = f"what has begun is committed first, for up to {grace:g} s"
        again = "what is not done by then is made again when the job is resumed"
        seconds = self._shard_seconds()
        if seconds is None:
            return f"{said}; how long a shard takes is not known from here; {again}"
        if seconds <= grace:
            return f"{said}; a shard takes {duration(seconds)}, so all of it will be"
        return (
            f"{said}; a shard takes {duration(seconds)}; {again}; with `stop --grace {math.ceil(seconds)}` nothing is"
        )

    def _shard_seconds(self) -> float | None:
        """How long a card takes for a shard: at the rate of the cards, else at the job's own; None if neither says."""
        try:
            ledger = OutputReader(self._storage())
            record, status = ledger.run(), read_status(ledger, 0.0)
            job = record.job if record else {}
            rates = [card["images_per_s"] for card in status["cards"].values() if card["images_per_s"]]
            if not rates and job["device"] == "simulated" and job["simulated"]["batch_seconds"]:
                rates = [job["batch_size"] / job["simulated"]["batch_seconds"]]
            return float(job["shard_size"] * job["num_images"] * len(rates) / sum(rates)) if rates else None
        except (GaudiBatchError, KeyError, TypeError):
            return None

    def _storage(self) -> Storage:
        return Storage(self.output, self.storage_options, PATIENCE_SECONDS)
