"""The story of a run: resolve the job, take the output, make what is missing, sum up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import signal
import socket
import string
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from gaudi_batch.cluster.address import address_of, refuse_without_stack
from gaudi_batch.cluster.devices import with_device
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.reasons import FailedRows
from gaudi_batch.dataset.repeats import RepeatedIds
from gaudi_batch.dataset.survey import refuse_bad_rows
from gaudi_batch.driver.growth import adds_to, grow, plan_rest, planned_rows, why_not_resumed
from gaudi_batch.driver.rerun import failed_rows, plan_again, rows_made_again
from gaudi_batch.errors import InputError, RunStopped, StorageError
from gaudi_batch.job import Job, resolve
from gaudi_batch.output.lease import LeaseKeeper, LeaseLost
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import finished_at
from gaudi_batch.output.place import refuse_file
from gaudi_batch.output.run_info import RunRecord
from gaudi_batch.output.spans import Stopwatch, card_hours, read_spans, wall_seconds
from gaudi_batch.output.tally import FILES, Tally, stop_lines
from gaudi_batch.output.throughput import rounded
from gaudi_batch.output.verify import Findings
from gaudi_batch.output.verify import verify as look
from gaudi_batch.plan import Shard
from gaudi_batch.reporting.stopping import watched_for_stop
from gaudi_batch.storage.store import Storage

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gaudi_batch.cluster.connection import CardResources
    from gaudi_batch.driver.loop import Driver

log = logging.getLogger("gaudi_batch")

GRACE_SECONDS = 30.0
KNOCK_SECONDS = 10.0
DRIVER_NAME_LENGTH = 5


class Interrupted(RunStopped):
    """Ctrl-C or SIGTERM ended the run."""

    exit_code = 130


class AtOnce(Interrupted):
    """A second one did, which waits for nothing."""


@dataclass(frozen=True)
class RunResult:
    """How a run came out."""

    output: str = field(repr=False)
    """Where its records are: the absolute path of a local directory, else the job's own URL, also if it has a secret in
    it."""
    summary: dict[str, Any]
    """What summary.json says."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """fsspec options of the output's storage, as the job has them."""

    @property
    def exit_code(self) -> int:
        """0: every image is made; 3: done, and some rows failed."""
        return 3 if self.summary["failed_rows"] else 0

    @property
    def manifest_path(self) -> str:
        """Where `manifest.parquet` is: a path, or a URL with what `output` has in it."""
        return f"{self.output}/manifest.parquet"

    def manifest(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The joined manifest: a row for each image and each failed row. All of it is in memory at once.

        Args:
            columns: which columns; None is all.

        Raises:
            StorageError: it can't be read.
        """
        with self._opened() as file:
            return file.read(columns=None if columns is None else list(columns))

    def failed_rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the manifest that have failed, each a dictionary with its `error`. One row group of the manifest
        is in memory at a time.

        Raises:
            StorageError: it can't be read.
        """
        import pyarrow.compute as pc

        with self._opened() as file:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                yield from group.filter(pc.equal(group.column("status"), "failed")).to_pylist()

    def _opened(self) -> pq.ParquetFile:
        import pyarrow as pa
        import pyarrow.parquet as pq

        storage = Storage(self.output, self.storage_options, read_only=True)
        return pq.ParquetFile(pa.PythonFile(storage.open("manifest.parquet"), mode="r"))


def run(
    config: JobConfig,
    *,
    address: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    retry_failed: bool = False,
    verify: bool = False,
    repair: bool = False,
    grace: float = GRACE_SECONDS,
) -> RunResult:
    """Makes every image of a job that its output does not have yet.

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
    watch = Stopwatch(driver)
    lease = LeaseKeeper(storage, driver)
    ledger = Ledger(storage, lease.hold, lease.holds)
    record = None if overwrite else ledger.run()
    address = address_of(address)
    config = with_device(config, address, record.job["device"] if record else None)
    job = resolve(config, record.fixed if record else None)
    if record:
        _refuse_another_job(ledger, record, job)
    else:
        refuse_without_stack(config, address)
        if address:
            _knock(address)
    if strict:
        refuse_bad_rows(job.dataset, job.rules, job.config.limit)
    ended = _Ended(None)
    try:
        lease.take(log.info)
        with _cluster(job, address, lease) as cards:
            if overwrite and ledger.holds_run():
                _try_card(job, ledger, cards(), lease)
            record, shards = _open_run(ledger, job, cards, overwrite)
            if repair:
                shards = _repair(ledger, job, shards, cards)
            if retry_failed:
                shards = _add_failed(ledger, job, shards, cards)
            made_again = rows_made_again(shards, job.dataset)
            tally, failed = Tally(), FailedRows(made_again)
            for facts, table in ledger.commits():
                tally.add(facts)
                failed.add(facts.shard, table)
            missing = [shard for shard in shards if shard.number not in tally.attempts]
            if len(missing) < len(shards):
                log.info("%d of %d shards are committed already", len(shards) - len(missing), len(shards))
            if missing:
                ended = _drive(
                    job, ledger, record, shards, missing, made_again, tally, failed, lease, cards(), watch, grace
                )
        result = _sum_up(ledger, record, shards, job, tally, lease, ended)
        if verify:
            _verify(ledger, made_again)
        return result
    except AtOnce:
        lease.forget()
        raise
    except (StorageError, KeyboardInterrupt):
        storage.hurry()
        raise
    finally:
        # With a manifest still on its way, nobody is to begin before the lease is stale.
        lease.release(lambda: not ledger.unsettled)


@dataclass(frozen=True)
class _Ended:
    """How the making of images ended."""

    reason: str | None
    """Why it stopped; None if every shard is committed."""
    faults: Mapping[str, int] = field(default_factory=dict)
    retries: int = 0
    watch: Stopwatch | None = None
    """This driver's; None if it had nothing to make, so that its time is not the run's."""
    card_s: float = 0.0
    """For how long it held cards, each counted by itself."""


def _refuse_another_job(ledger: Ledger, record: RunRecord, job: Job) -> None:
    if refusal := why_not_resumed(ledger, record, job):
        raise InputError(refusal)


@contextlib.contextmanager
def _cluster(job: Job, address: str | None, lease: LeaseKeeper) -> Iterator[Callable[[], CardResources]]:
    """Yields what connects to the cluster at its first call, or starts Ray, and says what a card takes of it. It is
    called before anything is written or removed that needs a card to be made good.

    Raises:
        InputError: there is no cluster, or it has no card for the job.
    """
    with contextlib.ExitStack() as opened:

        @functools.cache
        def cards() -> CardResources:
            # Ray is slow to import and nothing else here needs it. All that the run needs is imported before it
            # connects: of a job of the Jobs API, Ray may remove the directory that these modules lie in.
            import gaudi_batch.driver.account
            import gaudi_batch.driver.loop
            import gaudi_batch.driver.trial  # noqa: F401
            from gaudi_batch.cluster.connection import card_resources, connected, look_at_cluster
            from gaudi_batch.driver.slot import remove_groups_of

            started = time.monotonic()
            if address:
                _knock(address)
            restore = opened.enter_context(_handlers_kept())
            opened.enter_context(connected(job, address))
            restore()
            remove_groups_of(lease.dead)
            resources = card_resources(job)
            count, device = look_at_cluster(job.config, resources).cards, job.config.device
            if count == 0 and not job.config.asks_for_cards:
                needs = f"{resources.amount} {resources.name} a card"
                fewer = "take fewer with --cpu.threads, " if resources.name == "CPU" else ""
                raise InputError(
                    f"the cluster has no card for this job, which needs {needs}; {fewer}add nodes that have, ask its"
                    " autoscaler for them with --max-cards, or choose another device"
                )
            log.info("Ray is ready after %.1f s; %d cards, device %s", time.monotonic() - started, count, device)
            return resources

        yield cards


def _try_card(job: Job, ledger: Ledger, resources: CardResources, lease: LeaseKeeper) -> None:
    from gaudi_batch.driver.trial import try_card

    log.info("one card loads the model before the run in %s is removed", ledger.storage.url)
    try_card(job, resources, lease.driver)


def _open_run(
    ledger: Ledger, job: Job, cards: Callable[[], CardResources], overwrite: bool
) -> tuple[RunRecord, list[Shard]]:
    # Read again, now that the lease is ours: another driver may have begun the run in the meantime.
    record = None if overwrite else ledger.run()
    if record is None:
        cards()
        return ledger.create(job, afresh=overwrite)
    _refuse_another_job(ledger, record, job)
    if record.job.get("shard_size") != job.config.shard_size:
        log.info("the stored plan is used, with its shard_size of %s", record.job.get("shard_size"))
    if record.stacks is None:  # else the cards' own count, when they are ready
        for package, version in job.versions().items():
            before = record.versions.get(package)
            if before not in (None, version):
                log.warning("%s is %s here and was %s when the run began; images may differ", package, version, before)
    shards = ledger.plan(record.rows)
    if adds_to(record, job):
        if job.total_rows > record.rows:
            cards()
        grown, shards = grow(ledger, record, job)
        if grown.rows > record.rows:
            log.info("the run has %d rows and gets %d more", record.rows, grown.rows - record.rows)
        return grown, shards
    if planned_rows(shards) < record.rows:
        # Another driver's plan took the place of one with more rows, after run.json had said so.
        shards = [*shards, *plan_rest(shards, record, job)]
        log.warning("the plan had fewer rows than run.json says; the others are planned again")
        ledger.put_plan(shards)
    return record, shards


def _repair(ledger: Ledger, job: Job, shards: list[Shard], cards: Callable[[], CardResources]) -> list[Shard]:
    """The plan with shards for the rows that have missing or torn images."""
    findings = look(ledger, rows_made_again(shards, job.dataset))
    _say(findings)
    if not findings.broken:
        return shards
    added = plan_again(findings.broken, findings.images_of, shards, job.dataset, job.config.shard_size)
    log.info("%d rows with missing or torn images are made again, in %d new shards", len(findings.broken), len(added))
    cards()
    ledger.put_plan([*shards, *added])
    return [*shards, *added]


def _say(findings: Findings) -> None:
    for line in findings.lines():
        log.info("%s", line)


def _verify(ledger: Ledger, made_again: Mapping[int, int]) -> None:
    findings = look(ledger, made_again)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    ledger.put_json("verify.json", findings.describe() | {"time": now, "shards": len(ledger.committed_shards())})
    _say(findings)
    if findings.broken:
        raise RunStopped(
            f"{len(findings.missing)} images are missing and {len(findings.torn)} are torn; the same command with"
            " --repair makes them again"
        )


def _add_failed(ledger: Ledger, job: Job, shards: list[Shard], cards: Callable[[], CardResources]) -> list[Shard]:
    """The plan with shards for the rows that have failed and are in no shard that is still to be made."""
    all_failed = failed_rows(ledger.commits())
    if all_failed.hopeless:
        log.info(
            "%d failed rows can't be run whatever is tried, as what they ask for is against the rules; `error` in"
            " manifest.parquet says why",
            all_failed.hopeless,
        )
    committed = set(ledger.committed_shards())
    waiting = rows_made_again([shard for shard in shards if shard.number not in committed], job.dataset)
    failed = {row: shard for row, shard in all_failed.worth_a_try.items() if row not in waiting}
    if not failed:
        log.info("no failed row is left to run again")
        return shards
    added = plan_again(failed, {}, shards, job.dataset, job.config.shard_size)
    log.info("%d failed rows are run again, in %d new shards", len(failed), len(added))
    cards()
    ledger.put_plan([*shards, *added])
    return [*shards, *added]


def _drive(
    job: Job,
    ledger: Ledger,
    record: RunRecord,
    shards: list[Shard],
    missing: list[Shard],
    made_again: Mapping[int, int],
    tally: Tally,
    failed: FailedRows,
    lease: LeaseKeeper,
    resources: CardResources,
    watch: Stopwatch,
    grace: float,
) -> _Ended:
    """Has the missing shards made."""
    from gaudi_batch.card.messages import CardSetup
    from gaudi_batch.cluster.connection import look_at_cluster
    from gaudi_batch.driver.account import Account
    from gaudi_batch.driver.loop import Driver
    from gaudi_batch.reporting.terminal import open_view
    from gaudi_batch.scheduling.schedule import Schedule

    # Rows that are about to be run again have neither been made nor failed.
    undecided = [shard for shard in missing if shard.again]
    schedule = Schedule(
        missing,
        lease.driver,
        record.rows,
        tally.rows - sum(shard.rows for shard in undecided),
        tally.failed_rows - sum(shard.failed_before for shard in undecided),
        max_failed=job.config.max_failed,
        max_graphs=job.config.gaudi.max_graphs,
        condemned=_condemned(missing, made_again, job),
    )
    images_missing = (
        sum(shard.images for shard in shards if shard.number in tally.attempts and not shard.again) - tally.images
    )
    earlier = read_spans(ledger)
    account = Account(
        schedule, tally, failed, record.images, images_missing, lambda card_s: [*earlier, watch.span(card_s)]
    )
    setup = CardSetup(
        config=job.config,
        storage=ledger.storage,
        run_id=record.run_id,
        model=job.model,
        dataset=job.dataset,
        rules=job.rules,
        threads=job.threads,
        min_cpus=job.threads or 0 if job.config.device == "cpu" and not record.asked_no_card else 0,
    )
    with open_view() as view, _handlers_kept():
        driver = Driver(
            setup,
            resources,
            schedule,
            ledger,
            account,
            view,
            lambda: look_at_cluster(job.config, resources),
        )
        reason = _run_to_end(driver, grace, ledger.storage)
    if driver.at_once and reason == INTERRUPTED:
        raise AtOnce("interrupted at once; what was committed stays, and the same command resumes")
    if driver.at_once:
        raise LeaseLost(f"stopped: {reason}")
    return _Ended(reason, account.faults, schedule.retries, watch, account.card_s)


def _condemned(missing: list[Shard], made_again: Mapping[int, int], job: Job) -> dict[int, dict[int, str]]:
    """Rows of shards whose manifests were lost, on which a later shard has the last word."""
    found: dict[int, dict[int, str]] = {}
    again = sorted(made_again)
    for shard in missing:
        first = job.dataset.files[shard.file].first_row
        for row in again[bisect_left(again, first + shard.start) : bisect_left(again, first + shard.stop)]:
            if made_again[row] > shard.number:
                found.setdefault(shard.number, {})[row] = f"it failed, and is run again in shard {made_again[row]}"
    return found


def _knock(address: str) -> None:
    """Finds out at once what takes Ray minutes: that nobody listens. Raises InputError."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "//" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()
        except OSError as error:
            raise InputError(f"no Ray cluster answers at {address!r}: {error}") from None


async def _until_over(driver: Driver, grace: float, storage: Storage) -> str | None:
    """Runs the driver; the first signal stops it gently, the second at once, and a request in the output as it says."""
    loop = asyncio.get_running_loop()
    signals = 0

    def interrupted(number: int) -> None:
        nonlocal signals
        signals += 1
        name = signal.Signals(number).name
        if signals == 1:
            log.warning("%s: finishing what has begun, for up to %g s; once more stops at once", name, grace)
            driver.stop(INTERRUPTED, grace)
        else:
            driver.abandon(INTERRUPTED, at_once=True)

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            loop.add_signal_handler(number, interrupted, number)

    def asked(seconds: float) -> None:
        log.warning("asked to stop: finishing what has begun, for up to %g s", seconds)
        loop.call_soon_threadsafe(driver.stop, INTERRUPTED, seconds)

    with watched_for_stop(storage, asked):
        return await driver.run()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[Callable[[], None]]:
    """Leaves signals with the meaning that they had, at its end and when what it yields is called: Ray puts its own in
    its place when it starts, and an event loop the system's when it ends."""
    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if in_main}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()


SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "interrupted"


def _run_to_end(driver: Driver, grace: float, storage: Storage) -> str | None:
    """Runs the driver to its end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_until_over(driver, grace, storage))
    with ThreadPoolExecutor(1, "driver") as pool:
        over = pool.submit(asyncio.run, _until_over(driver, grace, storage))
        try:
            return over.result()
        except KeyboardInterrupt:
            driver.loop.call_soon_threadsafe(driver.stop, INTERRUPTED, grace)
        try:
            return over.result()
        except KeyboardInterrupt:
            driver.loop.call_soon_threadsafe(lambda: driver.abandon(INTERRUPTED, at_once=True))
            return over.result()


def _sum_up(
    ledger: Ledger,
    record: RunRecord,
    shards: list[Shard],
    job: Job,
    tally: Tally,
    lease: LeaseKeeper,
    ended: _Ended,
) -> RunResult:
    reason, rows = ended.reason, tally.rows
    try:
        summary = _write_summary(ledger, record, shards, job, tally, lease, ended)
        rows, reason = summary["rows"], summary["reason"]
    except StorageError as error:
        if reason is None:
            raise
        # Why the run stopped is worth more than that its end can't be written down either.
        log.warning("summary.json is not up to date: %s", error)
    else:
        for line in stop_lines(summary) if reason is not None else ():
            log.info("%s", line)
    if reason == INTERRUPTED:
        raise Interrupted(f"interrupted with {rows} of {record.rows} rows done; the same command resumes")
    if reason is not None:
        raise RunStopped(f"stopped: {reason} ({rows} of {record.rows} rows are done; the same command resumes)")
    return RunResult(ledger.storage.place, summary, ledger.storage.options)


def _write_summary(
    ledger: Ledger,
    record: RunRecord,
    shards: list[Shard],
    job: Job,
    tally: Tally,
    lease: LeaseKeeper,
    ended: _Ended,
) -> dict[str, Any]:
    reason = ended.reason
    ledger.hold()
    # A manifest may land while the others are read; what was in doubt before that stays in doubt.
    in_doubt = frozenset(ledger.unsettled)
    # What is committed is what storage says: another driver may have committed, too.
    known, tally = tally.attempts, tally.emptied()
    committed = set(ledger.committed_shards())
    made_again = rows_made_again([shard for shard in shards if shard.number in committed], job.dataset)
    failed = FailedRows(made_again)
    kinds = {shard.number: shard.bucket.batch_kind for shard in shards}
    for facts, table in ledger.commits():
        tally.add(facts, finished_at(table, facts), kinds.get(facts.shard))
        failed.add(facts.shard, table)
    lost = sorted(known.keys() - tally.attempts.keys())
    if lost and reason is None:
        reason = f"{len(lost)} manifests that were in place are gone or torn, the first of shard {lost[0]}"
    elif reason is None and tally.rows != record.rows:
        reason = f"the manifests have {tally.rows} rows, and the plan {record.rows}"
    if not lost:
        # The leavings of a driver that is taken for dead are safe to remove only when nothing is left to commit.
        removable = {lease.driver} if reason else lease.dead | {lease.driver}
        ledger.remove_orphans(
            tally.attempts,
            lambda attempt: attempt[:DRIVER_NAME_LENGTH] in removable and attempt not in in_doubt,
        )
    totals = tally.describe(ended.faults, ended.retries)
    if reason is None:
        repeated = RepeatedIds()

        def look_at_ids(table: pa.Table) -> None:
            if "id" in job.dataset.columns:
                repeated.add_manifest(table, job.config.seed, "seed" in job.dataset.columns)

        totals["images"], totals["failed_rows"] = ledger.join_manifests(made_again, tally.attempts, look_at_ids)
        totals["rows_that_share_an_id"] = repeated.rows()
        if said := repeated.describe():
            log.warning("%s", said)
    spans = [span for span in read_spans(ledger) if span.driver != lease.driver]
    spans += [ended.watch.span(ended.card_s)] if ended.watch else []
    drivers = {attempt[:DRIVER_NAME_LENGTH] for attempt in tally.attempts.values()}
    wall_s = wall_seconds(spans, drivers)
    state = "stopped" if reason else "complete with failed rows" if totals["failed_rows"] else "complete"
    summary = {
        "state": state,
        "reason": reason,
        "output": ledger.storage.url,
        "files": FILES,
        "images_planned": record.images,
        "rows_planned": record.rows,
        "started_at": record.created_at if wall_s is None else spans[0].started_at,
        "ended_at": max((span.ended_at for span in spans), default=None),
        "wall_s": wall_s,
        "images_per_s_wall": rounded(totals["images"] / wall_s) if wall_s else None,
        "card_hours": card_hours(spans, drivers),
        "drivers": [asdict(span) for span in spans],
        "failures": failed.describe(),
        **totals,
    }
    ledger.put_json("summary.json", summary)
    return summary
