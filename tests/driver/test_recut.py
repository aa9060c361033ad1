"""A run that is resumed on more cards is cut anew, and a number keeps its rows or is never committed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import Unfenced

from gaudi_batch import InputError, JobConfig
from gaudi_batch.driver.opening import begin_run, open_run
from gaudi_batch.driver.recut import recut
from gaudi_batch.driver.run_context import Committed, Run
from gaudi_batch.job import Job, resolve
from gaudi_batch.output import manifest
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.plan import Shard
from gaudi_batch.scheduling.pace import BatchTimes
from gaudi_batch.storage.store import Storage

ROWS = 2000


@pytest.fixture
def job(write_prompts: Callable[..., Path], tmp_path: Path) -> Job:
    widths = [64 if row % 50 < 25 else 128 for row in range(ROWS)]
    texts = [f"prompt {row}" for row in range(ROWS)]
    cut = 1200
    prompts = write_prompts(
        {"prompt": texts[:cut], "width": widths[:cut]}, {"prompt": texts[cut:], "width": widths[cut:]}
    )
    return resolve(JobConfig(prompts=str(prompts), output=str(tmp_path / "out"), device="simulated"))


def a_ledger(job: Job) -> Ledger:
    ledger = Ledger(Storage(job.config.output), Unfenced())
    ledger.run()
    return ledger


def a_run(job: Job, monkeypatch: pytest.MonkeyPatch, cards: int) -> Run:
    """The run as a driver finds it that may have so many cards."""
    ledger = a_ledger(job)
    info = ledger.run()
    assert info is not None
    monkeypatch.setattr(Run, "cards", cards)
    lease: Any = SimpleNamespace(driver="ccccc", past_holders=frozenset())
    connect: Any = None
    return Run(job, ledger, lease, info, ledger.plan(info.rows), connect, Commits(ledger, "aaaaa"))


def committed_of(run: Run) -> Committed:
    run.commits.refresh()
    return Committed.of(run)


def commit(ledger: Ledger, shard: Shard, attempt: str = "aaaaa1") -> bool:
    run = ledger.run()
    assert run is not None
    info = CommitInfo(shard.number, attempt, "c", "n", 0, shard.rows, 0, shard.images, ThroughputTotals(), run.run_id)
    return ledger.commit(info, manifest.build([], pa.table({}), {}, {}, 0, info))


def places(shards: list[Shard], job: Job) -> Counter[int]:
    """How often each row is in these shards."""
    counts: Counter[int] = Counter()
    for shard in shards:
        rows, _ = job.dataset.read(shard, job.rules)
        assert len(rows) == shard.rows
        counts.update(row.row for row in rows)
    return counts


def test_what_is_left_is_cut_for_the_cards_that_there_are_now(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    _, old = begin_run(a_ledger(job), job, 2)
    assert max(shard.images for shard in old) >= 56
    for shard in old[:3]:
        assert commit(a_ledger(job), shard)
    run = a_run(job, monkeypatch, 20)
    recut(run, committed_of(run))
    assert run.plan[:3] == old[:3], "what is committed stays"
    assert places(run.plan, job) == Counter(dict.fromkeys(range(ROWS), 1))
    left = run.plan[3:]
    assert max(shard.images for shard in left) <= 16
    again = a_run(job, monkeypatch, 20)
    assert again.plan == run.plan, "as it is stored"
    assert again.ledger.committed_shards() == [shard.number for shard in old[:3]]
    recut(again, committed_of(again))
    assert again.plan == run.plan, "there is nothing left to cut"
    assert sum(info.rows for info, _ in again.ledger.commits()) == sum(shard.rows for shard in old[:3])


@pytest.mark.parametrize("group", [100_000, 300])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("which", ["one is in flight", "every other one", "some"])
def test_a_new_shard_does_not_reach_over_rows_of_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, batch_size: int, group: int
) -> None:
    prompts = tmp_path / "many.parquet"
    pq.write_table(pa.table({"prompt": [f"p {row}" for row in range(2000)]}), prompts, row_group_size=group)
    output = str(tmp_path / "other")
    job = resolve(JobConfig(prompts=str(prompts), output=output, device="simulated", batch_size=batch_size))
    _, old = begin_run(a_ledger(job), job, 2)
    some = random.Random(1).sample(old, len(old) // 2)
    for shard in {"one is in flight": [old[0], *old[2:6]], "every other one": old[::2], "some": some}[which]:
        assert commit(a_ledger(job), shard)
    run = a_run(job, monkeypatch, 7)
    recut(run, committed_of(run))
    assert run.plan != old
    assert places(run.plan, job) == Counter(dict.fromkeys(range(2000), 1))


def test_a_driver_that_comes_back_and_commits_by_the_old_cut_commits_nothing(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, old = begin_run(a_ledger(job), job, 2)
    cut_off = a_ledger(job)
    run = a_run(job, monkeypatch, 20)
    recut(run, committed_of(run))
    new = {shard.number for shard in run.plan}
    retired = [shard for shard in old if shard.number not in new]
    assert retired
    assert not any(commit(cut_off, shard, "zombie") for shard in retired)
    for shard in run.plan:
        assert commit(run.ledger, shard)
    rows = sum(info.rows for info, _ in OutputReader(run.ledger.storage).commits())
    assert rows == ROWS


def test_a_shard_that_is_committed_while_it_is_retired_keeps_its_rows(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, old = begin_run(a_ledger(job), job, 2)
    run = a_run(job, monkeypatch, 20)
    committed = committed_of(run)
    assert commit(a_ledger(job), old[0], "zombie"), "after this driver has read what is committed"
    recut(run, committed)
    assert old[0] in run.plan
    assert places(run.plan, job) == Counter(dict.fromkeys(range(ROWS), 1))


def test_a_driver_that_ends_between_retiring_and_planning_leaves_no_row_behind(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_run(a_ledger(job), job, 2)
    run = a_run(job, monkeypatch, 20)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "put_recut_plan", killed)
        with pytest.raises(KeyboardInterrupt):
            recut(run, committed_of(run))
    again = a_run(job, monkeypatch, 2)
    committed = committed_of(again)
    assert committed.retired
    assert committed.totals.rows == 0
    recut(again, committed)
    assert not committed.retired & {shard.number for shard in again.plan}
    assert places(again.plan, job) == Counter(dict.fromkeys(range(ROWS), 1))


def test_a_shard_of_which_rows_were_made_again_is_not_cut(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows would be in a shard with a higher number, whose manifest would then count for them, too."""
    _, old = begin_run(a_ledger(job), job, 2)
    run = a_run(job, monkeypatch, 20)
    rerun = Shard(len(old), old[0].file, 0, 1, old[0].bucket, 1, 1, only=(0,), failed_before=1)
    run.plan = [*old, rerun]
    run.ledger.put_plan(run.plan)
    assert commit(run.ledger, rerun)
    recut(run, committed_of(run))
    holding = [shard for shard in run.plan if shard.file == old[0].file and shard.start <= 0 < shard.stop]
    assert [shard.number for shard in holding if shard.bucket == old[0].bucket] == [old[0].number, rerun.number]
    assert len(run.plan) > len(old) + 1, "the others are"


def test_rows_of_many_images_that_can_not_be_cut_are_left_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job.config.model_copy(update={"num_images": 100})
    many = Job(config, job.dataset, job.model, job.threads, job.bounds)
    begin_run(a_ledger(many), many, 2)
    for _ in range(3):
        run = a_run(many, monkeypatch, 500)
        recut(run, committed_of(run))
    before = run.plan
    recut(run, committed_of(run))
    assert run.plan == before
    assert max(shard.rows for shard in before) <= 2


@pytest.mark.parametrize(("cards", "size"), [(2, None), (1, None), (20, 100)])
def test_a_run_is_not_cut_for_fewer_cards_nor_if_its_job_names_a_size(
    job: Job, monkeypatch: pytest.MonkeyPatch, cards: int, size: int | None
) -> None:
    config = job.config.model_copy(update={"shard_size": size})
    named = Job(config, job.dataset, job.model, job.threads, job.bounds)
    _, old = begin_run(a_ledger(named), named, 2)
    run = a_run(job, monkeypatch, cards)
    recut(run, committed_of(run))
    assert run.plan == old
    assert a_ledger(job).manifests() == []


def test_a_run_that_goes_on_knows_how_long_its_batches_took(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = begin_run(a_ledger(job), job, 2)
    ledger, sums = a_ledger(job), ThroughputTotals(batches=8, images=60, steady_images=30, steady_s=4.0, warmup_s=40.0)
    record = ledger.run()
    assert record is not None
    shard = plan[0]
    info = CommitInfo(shard.number, "aaaaa1", "c", "n", 0, shard.rows, 0, shard.images, sums, record.run_id)
    assert ledger.commit(info, manifest.build([], pa.table({}), {}, {}, 0, info))
    run = a_run(job, monkeypatch, 2)
    times = committed_of(run).totals.batch_times()
    assert times == {shard.bucket.batch_kind: BatchTimes(steady_s=4.0, steady=4, warmup_s=40.0, warmup=4)}


@pytest.mark.parametrize("lost", ["same", "other"])
def test_rows_of_a_lost_plan_are_planned_again_as_they_were_committed_or_not_at_all(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan without the rows that a run has got later took the place of the one that had them."""
    prompts = tmp_path / "many.parquet"
    pq.write_table(pa.table({"prompt": [f"p {row}" for row in range(128)]}), prompts)

    def of(limit: int | None) -> Job:
        return resolve(JobConfig(prompts=str(prompts), output=str(tmp_path / "o"), device="simulated", limit=limit))

    monkeypatch.setattr("gaudi_batch.driver.opening.cards_of", lambda job, connect: 2)
    connect: Any = None
    open_run(a_ledger(of(64)), of(64), connect, False, "run")
    short = Path(tmp_path / "o/plan.parquet").read_bytes()
    _, plan = open_run(a_ledger(of(None)), of(None), connect, False, "run")
    shard = next(shard for shard in plan if shard.start >= 64)
    own = range(shard.start, shard.stop) if lost == "same" else range(shard.start + 8, shard.stop + 8)
    ledger = a_ledger(of(None))
    record = ledger.run()
    assert record is not None
    info = CommitInfo(shard.number, "aaaaa1", "c", "n", 0, shard.rows, shard.rows, 0, ThroughputTotals(), record.run_id)
    rows = of(None).dataset.read(replace(shard, start=own[0], stop=own[-1] + 1), of(None).rules)
    assert ledger.commit(info, manifest.build(rows[0], rows[1], {}, dict.fromkeys(own, "failed"), 0, info))
    Path(tmp_path / "o/plan.parquet").write_bytes(short)
    if lost == "same":
        _, again = open_run(a_ledger(of(None)), of(None), connect, False, "run")
        assert again == plan
    else:
        with pytest.raises(InputError, match=rf"shard {shard.number} is committed, and the plan that had it is lost"):
            open_run(a_ledger(of(None)), of(None), connect, False, "run")
