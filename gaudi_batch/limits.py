"""When a card has taken too long at what it does, so that nothing hangs."""

from __future__ import annotations

from collections.abc import Mapping

from gaudi_batch.config import JobConfig
from gaudi_batch.messages import Status
from gaudi_batch.plan import GraphKey

BATCH_LIMIT_FACTOR = 10
STORAGE_GRACE_SECONDS = 60.0
"""How much longer than the job's patience one operation on storage may take."""


def passed_limit(
    status: Status | None, since_heard: float, news_s: float, config: JobConfig, batch_s: Mapping[GraphKey, float]
) -> str | None:
    """Why a card has been at the same thing for too long, or None.

    Args:
        status: its last answer; None before the first, which comes when it has loaded.
        since_heard: seconds since then.
        news_s: seconds after which a card that has nothing to say answers.
        config: the job.
        batch_s: the longest batch of each graph key that any card has reported.
    """
    limits = config.limits
    phase, seconds = (status.phase, status.phase_s + since_heard) if status else ("loading", since_heard)
    if status and status.storage_s > config.storage_patience + STORAGE_GRACE_SECONDS:
        return f"an operation on storage has not ended for {status.storage_s:.0f} s"
    if phase == "idle":
        silent = since_heard > news_s + limits.answer
        return f"it has not answered for {since_heard:.0f} s (limits.answer)" if silent else None
    if phase == "loading":
        name, limit = "loading", limits.loading
    elif phase == "batch" and batch_s:
        name, limit = "batch", max(limits.batch, BATCH_LIMIT_FACTOR * max(batch_s.values()))
    else:
        name, limit = "first_batch", limits.first_batch
    return f"its {phase} took longer than {limit:g} s (limits.{name})" if seconds > limit else None
