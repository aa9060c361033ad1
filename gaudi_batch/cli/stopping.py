"""Stops a submitted job: says what will happen, and afterwards how the job ended."""

from __future__ import annotations

import logging
import math
from typing import Any

from gaudi_batch.cluster.jobs_client import STOP_MARGIN_S, STOPPED_EXIT_CODE, JobsClient
from gaudi_batch.cluster.submission import Submitted
from gaudi_batch.errors import GaudiBatchError, InputError
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.stop_request import put_request
from gaudi_batch.reporting.status import read_status
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import duration

log = logging.getLogger(__name__)

STOP_RETRY_TIMEOUT_S = 10.0
"""Seconds for which an output that fails is tried again."""


def stop_job(cluster: JobsClient, job: str, grace: float | None = None) -> str:
    """Tells a job to stop, says what will happen, and waits until it has ended; returns how it ended.

    Args:
        cluster: that runs it.
        job: its id.
        grace: seconds in which what has begun is committed; None for those that it was submitted with.

    Raises:
        InputError: there is no such job, or it can't be told.
        RunStopped: the cluster has not answered for too long since.
    """
    info = cluster.find(job)
    submitted = Submitted.read(info.metadata)
    if info.status.is_terminal():
        return _ended(info)
    if submitted is not None:
        log.info("job %s: %s", job, outlook(submitted, submitted.grace if grace is None else grace))
    if grace is not None:
        if submitted is None:
            raise InputError(f"job {job!r} was not submitted by this version; stop it without --grace")
        ask_to_stop(submitted, grace)
        if ended := cluster.wait(job, seconds=grace + STOP_MARGIN_S):
            return _ended(ended)
    return _ended(cluster.stop(job))


def ask_to_stop(submitted: Submitted, grace: float) -> None:
    """Puts a request into the output of a job. Raises InputError."""
    try:
        put_request(_output_of(submitted), submitted.submission, grace)
    except GaudiBatchError as error:
        raise InputError(
            f"--grace goes by the job's output, which can't be written from here: {error}; without it the job's own"
            f" grace of {submitted.grace:g} s holds"
        ) from None


def outlook(submitted: Submitted, grace: float) -> str:
    """One sentence on what stopping will do."""
    begun = f"what has begun is committed first, for up to {grace:g} s"
    again = "what is not done by then is made again when the job is resumed"
    seconds = _shard_seconds(submitted)
    if seconds is None:
        return f"{begun}; how long a shard takes is not known from here; {again}"
    if seconds <= grace:
        return f"{begun}; a shard takes {duration(seconds)}, so all of it will be"
    return f"{begun}; a shard takes {duration(seconds)}; {again}; with `stop --grace {math.ceil(seconds)}` nothing is"


def _shard_seconds(submitted: Submitted) -> float | None:
    """Seconds of a card for a shard, at the rate of the cards, else of the job; None if neither is known."""
    try:
        ledger = OutputReader(_output_of(submitted))
        record, status = ledger.run(), read_status(ledger, 0.0)
        job = record.job if record else {}
        rates = [card["images_per_s"] for card in status["cards"].values() if card["images_per_s"]]
        if not rates and job["device"] == "simulated" and job["simulated"]["batch_seconds"]:
            rates = [job["batch_size"] / job["simulated"]["batch_seconds"]]
        images = max(shard.images for shard in ledger.plan(record.rows)) if record else 0
        return float(images * len(rates) / sum(rates)) if rates else None
    except (GaudiBatchError, KeyError, TypeError, ValueError):
        return None


def _output_of(submitted: Submitted) -> Storage:
    return Storage(submitted.output, submitted.storage_options, STOP_RETRY_TIMEOUT_S)


def _ended(info: Any) -> str:
    """How a job has ended. One that was stopped by a request in its output ends by itself, which Ray calls failed."""
    return "STOPPED" if info.driver_exit_code == STOPPED_EXIT_CODE else str(info.status)
