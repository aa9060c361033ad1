"""The story of a run: resolve the job, take the output, make what is missing, sum up."""

from __future__ import annotations

import contextlib
import logging
import secrets
import string
from typing import TYPE_CHECKING

from gaudi_batch.cluster.address import address_of, check_reachable, refuse_without_stack
from gaudi_batch.cluster.devices import with_device
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.survey import refuse_bad_rows
from gaudi_batch.driver.connecting import cluster_of, connected_early, import_all
from gaudi_batch.driver.early import EarlyCards
from gaudi_batch.driver.finalize import sum_up, verify_images
from gaudi_batch.driver.log_keeper import LogKeeper
from gaudi_batch.driver.on_end import OnEnd
from gaudi_batch.driver.opening import open_run, refuse_another_job, retry_failed_rows
from gaudi_batch.driver.opening import repair as add_broken_rows
from gaudi_batch.driver.recut import recut
from gaudi_batch.driver.result import RunResult
from gaudi_batch.driver.run_context import Committed, Ended, Run
from gaudi_batch.driver.spending import Spending
from gaudi_batch.errors import ForcedInterrupt, InputError, RunStopped, StorageError
from gaudi_batch.job import Job, resolve
from gaudi_batch.layout import DRIVER_NAME_LENGTH, driver_of
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.lease import LeaseKeeper
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.place import refuse_file
from gaudi_batch.output.run_info import new_run_id
from gaudi_batch.output.spans import Held
from gaudi_batch.output.totals import result_lines
from gaudi_batch.storage.store import Storage

if TYPE_CHECKING:
    from gaudi_batch.cluster.connection import CardResources

log = logging.getLogger(__name__)

GRACE_S = 30.0
"""Seconds that a run which is told to stop may take to commit what it has begun."""


def run(
    config: JobConfig,
    *,
    address: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    retry_failed: bool = False,
    verify: bool = False,
    repair: bool = False,
    grace: float = GRACE_S,
) -> RunResult:
    """Makes every image of a job that its output does not have yet.

        >>> from gaudi_batch import JobConfig, run
        >>> run(JobConfig(prompts="prompts.parquet", output="out", device="simulated")).summary["state"]
        'complete'

    Args:
        config: the job.
        address: a Ray cluster; None takes RAY_ADDRESS, or starts Ray on this machine.
        strict: read every row first, and refuse the job if one can't be run.
        overwrite: remove the run that is in the output first, once the cluster has given a card that loads the model.
        retry_failed: run the rows that have failed again, but for those whose own data is against the rules.
        verify: read every image back at the end and compare it with its manifest.
        repair: do so at the start, and make the rows again whose images are missing or torn.
        grace: seconds that what has begun may take to be committed after SIGTERM or Ctrl-C.

    Raises:
        InputError: the job can't be run as it was given.
        RunStopped: the run ended before every image was made; the same call resumes it.
        StorageError: storage refused or failed for longer than `storage_patience`.
    """
    if not isinstance(config, JobConfig):
        raise InputError(f"run takes a JobConfig and not a {type(config).__name__}; JobConfig(**fields) makes one")
    storage = Storage(config.output, config.storage_options, config.storage_patience)
    refuse_file(storage)
    driver = "".join(secrets.choice(string.ascii_lowercase) for _ in range(DRIVER_NAME_LENGTH))
    spending = Spending(config, driver)
    lease = LeaseKeeper(storage, driver)
    ledger = Ledger(storage, lease)
    record = None if overwrite else ledger.run()
    if record is None:
        spending.refuse_if_over()
    address = address_of(address)
    device = record.job["device"] if record else None
    kept_log = LogKeeper(storage, lease)
    with kept_log.listening(), OnEnd(config) as on_end, connected_early(config, address, device):
        config = with_device(config, address, device)
        job = resolve(config, record.fixed if record else None)
        if record:
            refuse_another_job(ledger, record, job)
        else:
            refuse_without_stack(config, address)
            if address:
                check_reachable(address)
        if strict:
            refuse_bad_rows(job.dataset, job.rules, job.config.limit)
        try:
            with (
                contextlib.ExitStack() as opened,
                cluster_of(job, address, lease) as connect,
                EarlyCards(job, storage, driver, connect) as cards,
            ):
                run_id = new_run_id()

                def prepare() -> None:
                    """Connects and starts cards if the run is new; one that is there may be complete."""
                    import_all()
                    if record is None and not ledger.holds_run():
                        connect()
                        # Whether rows can be planned whose shapes must be read is found out first.
                        if not job.reads_shapes:
                            cards.start(run_id, job.batches, "the run is planned")

                lease.take(log.info, prepare)
                opened.enter_context(kept_log.storing())
                if overwrite and ledger.holds_run():
                    cards.give_back()
                    _try_card(job, ledger, connect(), driver)
                info, plan = open_run(ledger, job, connect, overwrite, run_id)
                this_run = on_end.run = Run(job, ledger, lease, info, plan, connect, Commits(ledger, driver))
                opened.callback(this_run.leftovers.close)
                spending.read_earlier(ledger)
                over = spending.examine(Held()) is not None
                manifests = ledger.manifest_entries()
                # A repair first needs the cluster's cards to read the images.
                if manifests and len(manifests) < len(plan) and not repair and not over:
                    cards.start(info.run_id, len(plan) - len(manifests), "all records of the run are read")
                this_run.commits.refresh(manifests)
                spending.note_committers({driver_of(commit.info.attempt) for commit in this_run.commits.in_order()})
                complete = all(shard.number in this_run.commits.by_shard for shard in plan)
                if over and complete and (repair or retry_failed):
                    # Either would add shards that nobody makes.
                    assert spending.reached is not None
                    raise RunStopped(f"stopped: {spending.reached.reason}; {spending.reached.way_out}")
                if repair and not over:
                    add_broken_rows(this_run)
                if retry_failed and not over:
                    retry_failed_rows(this_run)
                committed = Committed.of(this_run)
                if not over:
                    recut(this_run, committed)
                ended = _make_missing(this_run, cards, committed, spending, grace)
                result = sum_up(this_run, committed.totals, ended)
                if verify:
                    verify_images(this_run)
                for line in result_lines(ledger.storage.url, result.summary):
                    kept_log.note(line)
                return result
        except ForcedInterrupt:
            lease.forget(lambda: not ledger.in_doubt)
            raise
        except (StorageError, KeyboardInterrupt):
            storage.shut_down()
            raise
        finally:
            # While a manifest may still land, nobody may take the lease before it is stale.
            lease.release(lambda: not ledger.in_doubt)


def _try_card(job: Job, ledger: Ledger, resources: CardResources, driver: str) -> None:
    from gaudi_batch.driver.trial import try_card

    log.info("one card loads the model before the run in %s is removed", ledger.storage.url)
    try_card(job, resources, driver)


def _make_missing(run: Run, cards: EarlyCards, committed: Committed, spending: Spending, grace: float) -> Ended:
    """Makes the shards that are not committed, if there are any and the run may go on."""
    missing = [shard for shard in run.plan if shard.number not in committed.totals.attempts]
    if len(missing) < len(run.plan):
        log.info("%d of %d shards are committed already", len(run.plan) - len(missing), len(run.plan))
    if not missing:
        return Ended(None)
    run.begun = True
    if spending.reached is not None:
        return Ended(spending.reached.reason, way_out=spending.reached.way_out)
    run.connect()
    if not run.lease.follows_silent:
        run.leftovers.list_meanwhile()
    # Ray is slow to import, and nothing else here needs it.
    from gaudi_batch.driver.drive import make_missing

    return make_missing(run, cards, missing, committed, spending, grace)
