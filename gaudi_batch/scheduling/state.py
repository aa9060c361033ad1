"""The state that all parts of the schedule share: a run's shards, and what is known of failures. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gaudi_batch.plan import BatchKind, Bucket, Shard
from gaudi_batch.scheduling.admission import Requirements
from gaudi_batch.scheduling.backups import Backups
from gaudi_batch.scheduling.decisions import CheckStorage, Decision, Finish
from gaudi_batch.scheduling.dispatch import Dispatch
from gaudi_batch.scheduling.failures import ShardFailures
from gaudi_batch.scheduling.pace import BatchTimes
from gaudi_batch.scheduling.verdicts import NodeLosses, StorageFailures, TransientFailures, UnmadeBatches
from gaudi_batch.text import counted

ALL_FAILED_ROWS = 200
"""A run stops when so many rows failed in the pipeline and none was made: the job is wrong, not the rows."""


@dataclass(frozen=True)
class RowCounts:
    """Rows of a run."""

    total: int
    """Rows of the whole job; a share in `max_failed` is a share of these."""
    done: int = 0
    """Rows that were committed before this driver began."""
    failed: int = 0
    """Those among them that failed."""


@dataclass(frozen=True)
class Rules:
    """What the job prescribes to the schedule."""

    max_failed: int | float | None = None
    """Failed rows beyond which the run stops: a count (int), a share (float), or None."""
    batch_size: int = 1
    """Images of one pipeline call."""
    max_graphs: int = 16
    """Graph keys whose graphs a card keeps."""
    min_cards: int = 0
    """Cards to ask the cluster for, whatever it has."""
    max_cards: int | None = None
    """Cards to ask the cluster for as long as there is work for them; None takes what it has."""
    cluster_timeout_s: float = math.inf
    """Seconds that the run waits for a card that works, and for an answer of Ray (`limits.cluster`)."""
    requirements: Requirements = field(default_factory=Requirements)
    """What a card must have to make images of this run."""
    known_times: Mapping[BatchKind, BatchTimes] = field(default_factory=dict)
    """What earlier drivers' batches have taken, by kind."""


class RunState:
    """The state of a run.

    Args:
        shards: what is still to be made.
        prefix: what makes this driver's attempts unique over all drivers.
        rows: the rows of the run.
        rules: what the job says.
        failed_rows: rows of a shard to record as failed without a try, with the reason.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        prefix: str,
        rows: RowCounts,
        rules: Rules,
        failed_rows: Mapping[int, Mapping[int, str]],
    ) -> None:
        self.shards = {shard.number: shard for shard in shards}
        self.rules = rules
        self.total_rows = rows.total
        self.done_rows = rows.done
        self.failed_rows = rows.failed
        self.raised_rows = 0
        """Rows that failed in the pipeline, among those that were made for this driver."""
        self.retries = 0
        self.stop_reason: str | None = None
        self.finished = False
        self.stuck: dict[int, str] = {}
        """Shards that are not tried any more, with the reasons."""
        self.last_error = ""
        """The reason of the last failure of a card."""
        self.open = len(self.shards)
        """Shards that are neither committed nor stuck."""
        self.committing: dict[int, str] = {}
        """Shards whose commit is under way, each with its attempt."""
        self.work = Dispatch(self.shards, prefix, rules.max_graphs)
        self.cards = self.work.cards
        self.backups = Backups(self.work, self.shards, rules.batch_size, rules.known_times)
        self.now = -math.inf
        """The latest time that an event has told, in seconds, monotonic."""
        self.storage_failures = StorageFailures()
        self.unmade = UnmadeBatches()
        self.transient_failures = TransientFailures()
        self.node_losses = NodeLosses()
        self.capacity_expected = False
        """Whether the cluster may still give cards in place of those that are gone."""
        for number, reasons in failed_rows.items():
            self.work.failures[number] = ShardFailures(fail_without_running=dict(reasons))

    def stop(self, reason: str) -> None:
        """Begins no more work; the first reason counts."""
        self.stop_reason = self.stop_reason or reason

    def end(self, reason: str) -> list[Decision]:
        """Ends the run at once: what has begun can't be finished."""
        if self.finished:
            return []
        self.stop(reason)
        self.finished = True
        return [Finish(self.stop_reason)]

    # -- shards -------------------------------------------------------------------------------------------------

    def try_again(self, shard: int) -> None:
        """Notes a failed attempt and makes the shard pending again."""
        self.retries += 1
        self.put_back(shard)

    def put_back(self, shard: int) -> None:
        """Makes a shard pending again, before those that have not been tried, unless an attempt goes on or another one
        would be useless."""
        if shard in self.work.attempts_at:
            return  # another attempt goes on
        failures = self.work.failures.get(shard)
        reason = self.unmade.why(self.shards[shard])
        if reason is not None:
            self._give_up(shard, reason)
        elif failures is not None and failures.stuck:
            self._give_up(shard, failures.error)
        else:
            self.work.put_back(shard)

    def _give_up(self, shard: int, reason: str) -> None:
        self.stuck[shard] = reason
        self.open -= 1
        self.work.settle(shard)

    def lift(self, bucket: Bucket) -> None:
        """Notes that a card has made a batch of a bucket; if its kind was set aside, it no longer is."""
        for reason in self.unmade.made(bucket):
            for shard in [number for number, why in self.stuck.items() if why == reason]:
                del self.stuck[shard]
                self.open += 1
                self.put_back(shard)

    # -- limits of failures -------------------------------------------------------------------------------------

    def limit_failed_rows(self) -> None:
        """Stops the run if too many rows have failed."""
        limit = self.rules.max_failed
        if limit is not None and self.failed_rows > (limit if isinstance(limit, int) else limit * self.total_rows):
            self.stop(
                f"{counted(self.failed_rows, 'row')} failed, more than max_failed ({limit}); a larger one goes on"
            )
        elif self.raised_rows >= ALL_FAILED_ROWS and self.failed_rows == self.done_rows:
            self.stop(f"the first {self.raised_rows} rows that were tried all failed")

    def storage_failed(self, node: str, shard: int, error: str) -> list[Decision]:
        """Notes that storage failed for a card, which may be the fault of its node.

        Args:
            node: the node.
            shard: the shard that the card was at.
            error: how it failed.
        """
        if self.stop_reason is not None:
            return []  # it ends as soon as what has begun has; the cards that are given back say nothing of storage
        failures = self.storage_failures
        if failures.failed(node, self.cards.live_on.keys()):
            return self.end(error)
        if failures.being_checked:
            return []
        failures.being_checked = True
        return [CheckStorage(self.shards[shard])]
