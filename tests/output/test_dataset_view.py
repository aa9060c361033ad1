"""What is committed of a run as one dataset: nothing that was made again, whatever has been summed up of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from helpers import Unfenced
from records import BUCKET

from gaudi_batch import InputError, JobConfig, data_files, load_manifest
from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.driver import finalize
from gaudi_batch.driver.finalize import write_summary
from gaudi_batch.driver.opening import begin_run, retry_failed_rows
from gaudi_batch.driver.rerun import plan_rerun
from gaudi_batch.driver.run_context import Ended, Run
from gaudi_batch.export.export import ExportRequest, plan_export
from gaudi_batch.job import resolve
from gaudi_batch.layout import DATA, attempt_name, image_path
from gaudi_batch.output import manifest
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo, ImageInfo, StoredImage
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.plan import Shard
from gaudi_batch.reporting.status import describe_status, read_status
from gaudi_batch.storage.store import Storage

ROWS = 8
FAILED = {1: "boom", 5: "boom"}
LOST = (2, 3)
"""Rows of a shard whose images are not there any more."""


class _Killed(BaseException):
    pass


@pytest.fixture(params=["files", "webdataset"])
def run(request: Any, write_prompts: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A complete run of four shards, two rows of which failed, and the images of two others were lost since."""
    prompts = write_prompts({"prompt": [f"prompt {row}" for row in range(ROWS)]})
    fields = {"prompts": str(prompts), "output": str(tmp_path / "out"), "device": "simulated", "format": request.param}
    config = JobConfig(**fields, shard_size=2, batch_size=2)
    job = resolve(config)
    ledger = Ledger(Storage(config.output), Unfenced())
    info, plan = begin_run(ledger, job, 1)
    monkeypatch.setattr(Run, "cards", 1)
    lease: Any = SimpleNamespace(driver="aaaaa", past_holders=frozenset())
    connect: Any = lambda: None  # noqa: E731
    run = Run(job, ledger, lease, info, plan, connect, Commits(ledger, "aaaaa"))
    for shard in plan:
        commit(run, shard, FAILED)
    summary = write_summary(run, CommitTotals(), Ended(None))
    assert (summary["state"], summary["failed_rows"]) == ("complete with failed rows", 2)
    lost = load_manifest(config.output).to_table(filter=ds.field("row").isin(LOST))
    for path in lost["path"].to_pylist():
        ledger.remove(path)
    return run


def commit(run: Run, shard: Shard, failures: Mapping[int, str]) -> None:
    """Commits a shard as a card records it, each of whose objects is there."""
    rows = list(shard.only or range(shard.start, shard.stop))
    failures = {row: error for row, error in failures.items() if row in rows}
    output_format, attempt = run.job.config.format, f"aaaaa{shard.number}"
    images = {}
    for row in rows:
        if row not in failures:
            path, member = image_path(shard.number, attempt, row, 0, "png"), None
            if output_format != manifest.FILES:
                path, member = f"{DATA}/{attempt_name(shard.number, attempt)}.tar", path.rpartition("/")[2]
            run.ledger.put(path, b"image")
            stored = StoredImage(path, "0" * 64, datetime.now(timezone.utc), 0.0, 0.0, member)
            images[row, 0] = ImageInfo(stored, row, None, False)
    prompts = [PromptRow(row, f"r{row}", "p", "", None, BUCKET, 1, failures.get(row)) for row in rows]
    info = CommitInfo(
        shard.number,
        attempt,
        "n-0",
        "n",
        0,
        len(rows),
        len(failures),
        len(images),
        ThroughputTotals(),
        run.info.run_id,
        again=shard.is_rerun,
        failed_before=shard.failed_before,
        images_before=shard.images_before,
        format=output_format,
        object_sha256="" if output_format == manifest.FILES else "0" * 64,
    )
    data = manifest.build(prompts, pa.table({}), images, failures, 0, info)
    assert run.ledger.commit(info, data)
    run.commits.add(info, data)


def make_again(run: Run) -> None:
    """Commits what `--retry-failed` and `--repair` add."""
    before = len(run.plan)
    run.commits.refresh()
    retry_failed_rows(run)
    run.add(plan_rerun(dict.fromkeys(LOST, 1), dict.fromkeys(LOST, 1), run.plan, run.job.dataset, 2))
    for shard in run.plan[before:]:
        commit(run, shard, {})


def status_of(run: Run) -> tuple[str, str]:
    status = read_status(OutputReader(run.ledger.storage), watch_s=0.0)
    return status["state"], describe_status(status)


def test_rows_that_were_made_again_count_before_a_driver_has_summed_them_up(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever killed it in between."""
    output = run.job.config.output
    make_again(run)

    def killed(run: Run) -> Any:
        raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr(finalize, "_join", killed)
        with pytest.raises(_Killed):
            write_summary(run, CommitTotals(), Ended(None))
    paths = require_all_made(run)
    with pytest.raises(InputError, match="not complete"):
        plan_export(ExportRequest(output, f"{output}-set", complete=True))
    state, text = status_of(run)
    assert state == "stopped"
    assert "failed 0" in text
    assert "boom" not in text
    run.commits.refresh()
    assert write_summary(run, CommitTotals(), Ended(None))["state"] == "complete"
    assert require_all_made(run) == paths
    assert len(plan_export(ExportRequest(output, f"{output}-set", complete=True)).rows) == ROWS
    assert status_of(run)[0] == "complete"


def require_all_made(run: Run) -> list[str]:
    """Every row is made, once, also in an export; returns the paths of the images."""
    output = run.job.config.output
    table = load_manifest(output).to_table().sort_by("row")
    assert table["row"].to_pylist() == list(range(ROWS))
    assert set(table["status"].to_pylist()) == {"ok"}
    assert load_manifest(output).count_rows(filter=ds.field("shard") > 3) == 4
    export = plan_export(ExportRequest(output, f"{output}-set"))
    assert (len(export.rows), len(export.failures)) == (ROWS, 0)
    paths: list[str] = table["path"].to_pylist()
    assert all(run.ledger.storage.entry(path) for path in paths)
    if run.job.config.format != manifest.FILES:
        assert {f"{output}/{path}" for path in paths} == set(data_files(output))
    return paths


def test_a_run_that_begins_to_make_rows_again_is_not_complete(run: Run) -> None:
    """No row of it is committed yet."""
    run.commits.refresh()
    retry_failed_rows(run)
    assert status_of(run)[0] == "stopped"
    assert load_manifest(run.job.config.output).count_rows(filter=ds.field("status") == "failed") == 2
