"""A run, as one object that all parts of its driver share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gaudi_batch.dataset.reasons import FailedRows
from gaudi_batch.driver.leftovers import Leftovers
from gaudi_batch.driver.rerun import latest_shards_of_rows
from gaudi_batch.job import Job
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.spans import Held, Stopwatch
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.plan import Shard

if TYPE_CHECKING:
    from gaudi_batch.cluster.connection import CardResources


def cards_of(job: Job, connect: Callable[[], CardResources]) -> int:
    """How many cards a job may have.

    Args:
        job: the job.
        connect: connects to the cluster; returns what a card takes of it.
    """
    resources = connect()
    # Ray is slow to import, and a run that is complete does not need it.
    from gaudi_batch.cluster.connection import cards_expected

    return cards_expected(job.config, resources)


@dataclass
class Run:
    """A run that this process drives."""

    job: Job
    ledger: Ledger
    lease: LeaseKeeper
    info: RunInfo
    """What run.json says."""
    plan: list[Shard]
    """All shards, also those that make rows again."""
    connect: Callable[[], CardResources]
    """Connects to the cluster at its first call; returns what a card takes of the cluster. Raises InputError."""
    commits: Commits
    """What is committed of it."""
    begun: bool = False
    """Whether this driver found shards to make."""
    summary: Mapping[str, Any] | None = None
    """What summary.json says of it, once this driver has written that."""
    leftovers: Leftovers = field(init=False)
    """What attempts have left that were not committed."""

    def __post_init__(self) -> None:
        past, output_format = self.lease.past_holders, self.job.config.format
        self.leftovers = Leftovers(self.ledger, self.lease.driver, past, self.commits.attempt_of, output_format)

    @property
    def latest_shard_of_row(self) -> Mapping[int, int]:
        """Rows that are in several shards, each with the highest number of these."""
        return latest_shards_of_rows(self.plan, self.job.dataset)

    @property
    def cards(self) -> int:
        """How many cards the job may have; connects to the cluster."""
        return cards_of(self.job, self.connect)

    def add(self, shards: list[Shard]) -> None:
        """Adds shards to the stored plan, after connecting to a cluster that can make them."""
        self.connect()
        self.ledger.put_plan([*self.plan, *shards])
        self.plan = [*self.plan, *shards]


@dataclass(frozen=True)
class Committed:
    """What is committed of a run."""

    totals: CommitTotals
    failed: FailedRows
    retired: frozenset[int] = frozenset()
    """Shards that are retired and whose rows the plan has in no other shard yet: a driver ended in between."""

    @classmethod
    def of(cls, run: Run) -> Committed:
        """Counts what is known to be committed."""
        totals, failed = CommitTotals(), FailedRows(run.latest_shard_of_row)
        kinds = {shard.number: shard.bucket.batch_kind for shard in run.plan}
        for commit in run.commits.in_order():
            totals.add(commit.info, kind=kinds.get(commit.info.shard))
            if commit.failed is not None:
                failed.add(commit.info.shard, commit.failed)
        return cls(totals, failed, frozenset(run.commits.retired))


@dataclass(frozen=True)
class Ended:
    """How the making of images ended."""

    reason: str | None
    """Why it stopped; None if every shard is committed."""
    faults: Mapping[str, int] = field(default_factory=dict)
    """Faults of the cards, by label."""
    retries: int = 0
    watch: Stopwatch | None = None
    """This driver's time; None if it had no shard to make, since its time is then not the run's."""
    held: Held = Held()  # noqa: RUF009
    """What it held of the cluster."""
    way_out: str = "the same command resumes"
    """What a person can do about the reason."""
