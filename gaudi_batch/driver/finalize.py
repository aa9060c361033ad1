"""The end of a run: counts what is committed, removes what is left over, writes summary.json."""

from __future__ import annotations

import logging
import shlex
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa

from gaudi_batch.dataset.reasons import FailedRows
from gaudi_batch.dataset.repeats import RepeatedIds
from gaudi_batch.driver.rerun import latest_shards_of_rows, shards_with
from gaudi_batch.driver.result import RunResult
from gaudi_batch.driver.run_context import Committed, Ended, Run
from gaudi_batch.driver.signals import INTERRUPTED
from gaudi_batch.driver.verifying import verify_run
from gaudi_batch.errors import Interrupted, RunStopped, StorageError
from gaudi_batch.layout import DATA, REPORT_FILE, driver_of
from gaudi_batch.output import manifest
from gaudi_batch.output.cleanup import remove_parts, remove_superseded
from gaudi_batch.output.cost import Price
from gaudi_batch.output.joined import join_manifests, put_description
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.records import RunRecords
from gaudi_batch.output.spans import card_hours, read_spans, wall_seconds, whole_cost
from gaudi_batch.output.throughput import rounded
from gaudi_batch.output.totals import FILES, CommitTotals, stop_lines
from gaudi_batch.text import counted, describe_error

log = logging.getLogger(__name__)

REPORT_RETRY_TIMEOUT_S = 10.0
"""Seconds for which what a report reads is tried again: the run is over, and its lease is held meanwhile."""


def sum_up(run: Run, totals: CommitTotals, ended: Ended) -> RunResult:
    """Writes the summary of a run that makes no more images.

    Args:
        run: the run.
        totals: what this driver knows to be committed.
        ended: how the making of images ended.

    Raises:
        Interrupted: a signal stopped it.
        RunStopped: something else did, or manifests are gone.
        StorageError: the summary of a run that is complete can't be written.
    """
    reason, rows = ended.reason, totals.rows
    summary: dict[str, Any] | None = None
    try:
        summary = run.summary = write_summary(run, totals, ended)
        rows, reason = summary["rows"], summary["reason"]
    except StorageError as error:
        if reason is None:
            raise
        # A run that stopped reports why it stopped; that its summary can't be written is only a warning.
        log.warning("summary.json is not up to date: %s", error)
    else:
        for line in stop_lines(summary) if reason is not None else ():
            log.info("%s", line)
        if ended.watch is not None or reason is not None or run.ledger.storage.entry(REPORT_FILE) is None:
            _write_report(run, summary)
    total = run.info.rows
    if reason == INTERRUPTED:
        raise Interrupted(f"interrupted with {rows} of {total} rows done; the same command resumes", summary)
    if reason is not None:
        raise RunStopped(f"stopped: {reason} ({rows} of {total} rows are done; {ended.way_out})", summary)
    assert summary is not None
    return RunResult(run.ledger.storage.place, summary, run.ledger.storage.options)


def _write_report(run: Run, summary: dict[str, Any]) -> None:
    """Writes the report of a run. Whatever becomes of it, the run is what it is without one."""
    # What draws pictures is slow to import.
    from gaudi_batch.reporting.report.report import make_report

    again = f"gaudi-batch report {shlex.quote(run.ledger.storage.url)} makes it"
    try:
        reader = OutputReader(run.ledger.storage.tried_for(REPORT_RETRY_TIMEOUT_S))
        reader.run()
        commits = list(run.commits.in_order())
        records = RunRecords(reader, run.info, run.plan, commits, run.latest_shard_of_row, read_spans(reader))
        run.ledger.put(REPORT_FILE, make_report(records, summary["state"], summary["reason"]))
    except KeyboardInterrupt:
        log.warning("interrupted; the report is not written, %s", again)
    except Exception as error:
        log.warning("the report is not written, %s: %s", again, describe_error(error))
        log.debug("the report failed", exc_info=True)


def verify_images(run: Run) -> None:
    """Reads every image back and writes verify.json. Raises RunStopped if images are missing or torn."""
    report = verify_run(run)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run.ledger.put_json("verify.json", report.describe() | {"time": now, "shards": len(run.commits.by_shard)})
    for line in report.lines():
        log.info("%s", line)
    if report.broken:
        noun = "image" if run.job.config.format == manifest.FILES else "object"
        raise RunStopped(
            f"missing: {counted(len(report.missing), noun)}, torn: {counted(len(report.torn), noun)}; the same"
            " command with --repair makes them again",
            run.summary,
        )


def write_summary(run: Run, totals: CommitTotals, ended: Ended) -> dict[str, Any]:
    """Counts what storage has of a run, removes leftovers, joins the manifests of a complete run, and writes
    summary.json; returns its content.

    Args:
        run: the run.
        totals: what this driver knows to be committed.
        ended: how the making of images ended.
    """
    ledger = run.ledger
    ledger.ensure_held()
    # A manifest may land while the others are read: an attempt that was in doubt before stays in doubt.
    in_doubt = frozenset(ledger.in_doubt)
    # Storage decides what is committed: another driver may have committed, too.
    committed = _count(run, totals.emptied())
    lost = sorted(totals.attempts.keys() - committed.totals.attempts.keys())
    totals = committed.totals
    reason = ended.reason or _why_incomplete(run, totals, lost)
    if not lost:
        try:
            run.leftovers.remove(totals.attempts, in_doubt, is_complete=reason is None)
        except StorageError as error:
            log.warning("what attempts have left that were not committed is still there: %s", error)
    figures = totals.describe(ended.faults, ended.retries)
    if reason is None:
        figures |= _join(run)
        _remove_rest(run)
    elif run.job.config.format == manifest.FILES:
        try:
            put_description(run.commits, run.latest_shard_of_row)
        except StorageError as error:
            log.warning("images/metadata.parquet is not up to date: %s", error)
    summary = {
        "state": "stopped" if reason else "complete with failed rows" if figures["failed_rows"] else "complete",
        "reason": reason,
        "output": ledger.storage.url,
        "files": FILES if run.job.config.format == manifest.FILES else FILES | {"images": DATA},
        "images_planned": run.info.images,
        "rows_planned": run.info.rows,
        **_times(run, totals, ended, figures["images"]),
        "failures": committed.failed.describe(),
        **figures,
    }
    ledger.put_json("summary.json", summary)
    return summary


def _count(run: Run, totals: CommitTotals) -> Committed:
    """Counts what is committed now."""
    run.commits.refresh()
    in_place = [shard for shard in run.plan if shard.number in run.commits.by_shard]
    latest_shard_of_row = latest_shards_of_rows(in_place, run.job.dataset)
    failed = FailedRows(latest_shard_of_row)
    kinds = {shard.number: shard.bucket.batch_kind for shard in run.plan}
    for commit in run.commits.in_order():
        info = commit.info
        totals.add(info, info.finished_at, kinds.get(info.shard))
        if commit.failed is not None:
            failed.add(info.shard, commit.failed)
    return Committed(totals, failed)


def _why_incomplete(run: Run, totals: CommitTotals, lost: list[int]) -> str | None:
    if lost:
        return f"{len(lost)} manifests that were in place are gone or torn, the first of shard {lost[0]}"
    missing = [shard.number for shard in run.plan if shard.number not in totals.attempts]
    if missing:
        return f"no manifest of {counted(len(missing), 'shard')} is in place, the first of which is {missing[0]}"
    if totals.rows != run.info.rows:
        return f"the manifests have {totals.rows} rows, and the plan {run.info.rows}"
    return None


def _join(run: Run) -> dict[str, Any]:
    """Joins the manifests of a complete run; returns the totals of the joined manifest."""
    job, repeated = run.job, RepeatedIds()

    def count_ids(table: pa.Table) -> None:
        if "id" in job.dataset.columns:
            repeated.add_manifest(table, job.config.seed, "seed" in job.dataset.columns)

    images, failed_rows = join_manifests(
        run.commits, run.latest_shard_of_row, count_ids, job.config.format == manifest.FILES
    )
    if warning := repeated.describe():
        log.warning("%s", warning)
    return {"images": images, "failed_rows": failed_rows, "rows_that_share_an_id": repeated.rows()}


def _remove_rest(run: Run) -> None:
    """Removes what nothing in a complete run points to."""
    latest = run.latest_shard_of_row
    try:
        shards = [shard.number for shard in shards_with(latest, run.plan, run.job.dataset)]
        remove_superseded(run.ledger, latest, [shard for shard in shards if shard in run.commits.by_shard])
        run.commits.remove_unused(run.leftovers.drivers)
        remove_parts(run.ledger, run.lease.driver)
    except StorageError as error:
        log.warning("what drivers that were killed have left is still there: %s", error)


def _times(run: Run, totals: CommitTotals, ended: Ended, images: int) -> dict[str, Any]:
    """The times of a run, from those of its drivers."""
    spans = [span for span in read_spans(run.ledger) if span.driver != run.lease.driver]
    spans += [ended.watch.span(ended.held)] if ended.watch else []
    drivers = {driver_of(attempt) for attempt in totals.attempts.values()}
    wall_s = wall_seconds(spans, drivers)
    cost = None if wall_s is None else whole_cost(spans, Price.of(run.job.config))
    return {
        "started_at": run.info.created_at if wall_s is None else spans[0].started_at,
        "ended_at": max((span.ended_at for span in spans), default=None),
        "wall_s": wall_s,
        "images_per_s_wall": rounded(images / wall_s) if wall_s else None,
        "card_hours": card_hours(spans, drivers),
        "cost": rounded(cost),
        "cost_per_image": None if cost is None or not images else float(f"{cost / images:.4g}"),
        "drivers": [asdict(span) for span in spans],
    }
