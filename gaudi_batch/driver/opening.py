"""The run in an output: begun, resumed, grown, or given shards for rows to make again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from gaudi_batch.driver.growth import adds_to, grow, plan_rest, planned_rows, refuse_other_rows, why_not_resumed
from gaudi_batch.driver.rerun import failed_rows, latest_shards_of_rows, plan_rerun, rows_of_shards
from gaudi_batch.driver.run_context import Run, cards_of
from gaudi_batch.driver.verifying import verify_run
from gaudi_batch.errors import InputError
from gaudi_batch.garbage import no_collections
from gaudi_batch.job import Job
from gaudi_batch.output.cleanup import clear
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.plan import Shard
from gaudi_batch.planner import MAX_IMAGES, PARTS_OF_SHARE
from gaudi_batch.text import counted

if TYPE_CHECKING:
    from gaudi_batch.cluster.connection import CardResources

log = logging.getLogger(__name__)


def refuse_another_job(ledger: Ledger, record: RunInfo, job: Job) -> None:
    """Raises InputError if a job can't go on with the run that is there."""
    if refusal := why_not_resumed(ledger, record, job):
        raise InputError(refusal)


def begin_run(
    ledger: Ledger, job: Job, cards: int, *, overwrite: bool = False, run_id: str | None = None
) -> tuple[RunInfo, list[Shard]]:
    """Plans a job and writes down its plan, then its run.json.

    Args:
        ledger: the output's records.
        job: the job.
        cards: how many cards it may have.
        overwrite: whether a run that is there is removed, once the job is planned.
        run_id: of the new run; None chooses one.

    Raises:
        InputError: the job can't be planned, or there are commits of a run whose run.json is not there.
    """
    with no_collections():
        shards = list(job.plan(cards))
    if overwrite:
        clear(ledger)
    else:
        ledger.refuse_leftovers()
    info = RunInfo.of(job, shards, run_id)
    ledger.begin(info, shards)
    return info, shards


def open_run(
    ledger: Ledger, job: Job, connect: Callable[[], CardResources], overwrite: bool, run_id: str | None = None
) -> tuple[RunInfo, list[Shard]]:
    """Begins a run or goes on with the existing one; returns the content of its run.json, and its plan.

    Args:
        ledger: the output's records.
        job: the job.
        connect: connects to the cluster, before anything is written that only cards can complete.
        overwrite: whether a run that is there is removed, once the job is planned.
        run_id: of a run that begins now; None chooses one.

    Raises:
        InputError: the run that is there is another job's, or there is no cluster.
    """
    # Read again, now that the lease is ours: another driver may have begun the run in the meantime.
    record = None if overwrite else ledger.run()
    if record is None:
        return begin_run(ledger, job, cards_of(job, connect), overwrite=overwrite, run_id=run_id)
    refuse_another_job(ledger, record, job)
    if job.config.shard_size not in (None, record.job.get("shard_size")):
        log.info("the stored plan is used, whatever shard_size is now")
    if record.stacks is None:  # else the schedule compares the versions that the cards report
        for package, version in job.versions().items():
            before = record.versions.get(package)
            if before not in (None, version):
                log.warning("%s is %s here and was %s when the run began; images may differ", package, version, before)
    shards = ledger.plan(record.rows)
    if adds_to(record, job):
        grown, shards = grow(ledger, record, job, cards_of(job, connect) if job.total_rows > record.rows else 1)
        if grown.rows > record.rows:
            log.info("the run has %d rows and gets %d more", record.rows, grown.rows - record.rows)
        return grown, shards
    if planned_rows(shards) < record.rows:
        # Another driver's plan replaced one with more rows after run.json had counted them.
        rest = plan_rest(shards, record, job, cards_of(job, connect))
        refuse_other_rows(ledger, rest, job)
        shards = [*shards, *rest]
        log.warning("the plan had fewer rows than run.json says; the others are planned again")
        ledger.put_plan(shards)
    return record, shards


def repair(run: Run) -> None:
    """Adds shards for rows with missing or torn images."""
    report = verify_run(run)
    for line in report.lines():
        log.info("%s", line)
    if report.broken:
        job = run.job
        size = _rerun_size(run, len(report.broken))
        added = plan_rerun(report.broken, report.images_of, run.plan, job.dataset, size, run.ledger.manifests())
        count = len(report.broken)
        rows = counted(count, "row with missing or torn images", "rows with missing or torn images")
        log.info("to make again: %s, in %s", rows, counted(len(added), "new shard"))
        run.add(added)


def retry_failed_rows(run: Run) -> None:
    """Adds shards for the failed rows that no uncommitted shard has."""
    job = run.job
    all_failed = failed_rows(run.commits.in_order(), rows_of_shards(run.plan, job.dataset))
    if all_failed.hopeless:
        log.info(
            "%s can't be run whatever is tried: what the data asks for is against the rules; `error` in"
            " manifest.parquet says why",
            counted(all_failed.hopeless, "failed row"),
        )
    committed = run.commits.by_shard.keys()
    pending = latest_shards_of_rows([shard for shard in run.plan if shard.number not in committed], job.dataset)
    failed = {row: shard for row, shard in all_failed.worth_a_try.items() if row not in pending}
    if not failed:
        log.info("no failed row is left to run again")
        return
    size = _rerun_size(run, len(failed))
    added = plan_rerun(failed, {}, run.plan, job.dataset, size, run.ledger.manifests())
    log.info("to run again: %s, in %s", counted(len(failed), "failed row"), counted(len(added), "new shard"))
    run.add(added)


def _rerun_size(run: Run, rows: int) -> int:
    """Rows of a shard that makes rows again."""
    config = run.job.config
    if config.shard_size is not None:
        return config.shard_size
    share = rows // (run.cards * PARTS_OF_SHARE)
    return max(1, config.batch_size // config.num_images, min(share, MAX_IMAGES // config.num_images))
