"""Makes the missing shards of a run: builds the schedule, runs the driver, says how it ended."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from gaudi_batch.driver.describing import Description
from gaudi_batch.driver.early import EarlyCards
from gaudi_batch.driver.loop import Driver
from gaudi_batch.driver.progress import RunProgress
from gaudi_batch.driver.run_context import Committed, Ended, Run
from gaudi_batch.driver.signals import INTERRUPTED, LoopRunner, handlers_kept
from gaudi_batch.driver.spending import Spending
from gaudi_batch.errors import ForcedInterrupt
from gaudi_batch.output.lease import LeaseLost
from gaudi_batch.output.manifest import FILES
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.plan import Shard
from gaudi_batch.reporting.terminal import open_view
from gaudi_batch.scheduling.admission import Requirements
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.state import RowCounts, Rules


def make_missing(
    run: Run, cards: EarlyCards, missing: list[Shard], committed: Committed, spending: Spending, grace: float
) -> Ended:
    """Makes shards.

    Args:
        run: the run.
        cards: its cards, some of which may have started.
        missing: its shards that are not committed.
        committed: what is; goes on being added to.
        spending: the time of this driver, and what the run costs and may cost.
        grace: seconds that what has begun may take to be committed after SIGTERM or Ctrl-C.

    Raises:
        ForcedInterrupt: a second signal ended it.
        LeaseLost: another driver has taken over.
    """
    schedule = _schedule(run, missing, committed)
    totals = committed.totals
    planned = sum(shard.images for shard in run.plan if shard.number in totals.attempts and not shard.is_rerun)
    timeline = Timeline(run.ledger, run.lease.driver)
    progress = RunProgress(
        schedule,
        committed,
        run.info.images,
        planned - totals.images,
        spending,
        timeline,
    )
    description = Description(run) if run.job.config.format == FILES else None
    if description is not None:
        run.commits.added = description.committed
    timeline.begin()
    cards.settle()
    with open_view() as view, handlers_kept():
        loop = LoopRunner(
            lambda: Driver(cards.take(run.info.run_id), schedule, run.commits, run.leftovers, progress, view),
            grace,
            run.ledger.storage,
        )
        is_complete = False
        try:
            driver, reason = loop.run()
            is_complete = reason is None
        finally:
            if description is not None:
                description.close(wait=is_complete)
    if driver.at_once and reason == INTERRUPTED:
        raise ForcedInterrupt("interrupted at once; what was committed stays, and the same command resumes")
    if driver.at_once:
        raise LeaseLost(f"stopped: {reason}")
    ended = Ended(reason, progress.faults, schedule.retries, spending.watch, progress.held)
    if spending.reached is not None and spending.reached.reason == reason:
        return replace(ended, way_out=spending.reached.way_out)
    return ended


def _schedule(run: Run, missing: list[Shard], committed: Committed) -> Schedule:
    job, config, totals = run.job, run.job.config, committed.totals
    # Rows that will run again count neither as made nor as failed.
    undecided = [shard for shard in missing if shard.is_rerun]
    rows = RowCounts(
        run.info.rows,
        totals.rows - sum(shard.rows for shard in undecided),
        totals.failed_rows - sum(shard.failed_before for shard in undecided),
    )
    fixed_threads = config.device == "cpu" and not run.info.asked_no_card
    min_cpus = job.threads or 0 if fixed_threads else 0
    rules = Rules(
        max_failed=config.max_failed,
        batch_size=config.batch_size,
        max_graphs=config.gaudi.max_graphs,
        min_cards=config.min_cards,
        max_cards=config.max_cards,
        cluster_timeout_s=config.limits.cluster,
        known_times=totals.batch_times(),
        requirements=Requirements(job.model.name, job.model.revision, job.threads, min_cpus, run.ledger.stack),
    )
    return Schedule(missing, run.lease.driver, rows, rules, _failed_without_running(run, missing))


def _failed_without_running(run: Run, missing: list[Shard]) -> dict[int, dict[int, str]]:
    """Rows that a shard whose manifest was lost leaves to a later shard, with the error recorded for them."""
    failed: dict[int, dict[int, str]] = {}
    latest_shard_of_row = run.latest_shard_of_row
    rows = sorted(latest_shard_of_row)
    for shard in missing:
        first = run.job.dataset.files[shard.file].first_row
        for row in rows[bisect_left(rows, first + shard.start) : bisect_left(rows, first + shard.stop)]:
            if latest_shard_of_row[row] > shard.number:
                failed.setdefault(shard.number, {})[row] = (
                    f"it failed, and is run again in shard {latest_shard_of_row[row]}"
                )
    return failed
