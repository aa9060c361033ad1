"""What a driver that is no longer the one may still do: nothing. And what it had under way does no harm."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from helpers import wait_until
from ray.exceptions import ActorUnavailableError

from gaudi_batch import JobConfig
from gaudi_batch.driver import finalize, runner
from gaudi_batch.driver.calls import ask_back, send
from gaudi_batch.driver.finalize import write_summary
from gaudi_batch.driver.leftovers import Leftovers
from gaudi_batch.driver.opening import begin_run
from gaudi_batch.driver.run_context import Ended, Run
from gaudi_batch.driver.slot import Slot
from gaudi_batch.errors import InputError, RunStopped, StorageError
from gaudi_batch.job import resolve
from gaudi_batch.layout import manifest_path, timeline_path
from gaudi_batch.output import holder, lease, ledger, manifest, reader
from gaudi_batch.output.cleanup import clear, left_by_attempts, remove_left
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.holder import read_lease
from gaudi_batch.output.joined import join_manifests
from gaudi_batch.output.lease import LeaseKeeper, LeaseLost
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.output.totals import CommitTotals
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.storage import disk, retry, store
from gaudi_batch.storage.store import Storage


class Clock:
    """The lease's: whoever sleeps waits for nothing, and it is later. Between two looks at it, time passes."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self.meanwhile: Callable[[], object] = lambda: None
        """What happens while somebody sleeps."""

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (lease, holder):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name in ("SETTLE_INTERVAL_S", "REREAD_INTERVAL_S"):
        monkeypatch.setattr(lease, name, 0.0)
    return Storage(str(tmp_path / "out"), retry_timeout_s=1.0)


@pytest.fixture
def first(output: Storage) -> LeaseKeeper:
    """A driver that has the lease."""
    keeper = LeaseKeeper(output, "aaaaa")
    keeper.take()
    return keeper


def take_over(output: Storage) -> None:
    """Another driver has the lease from now on."""
    held = json.loads(output.get("lease.json") or b"")
    output.put("lease.json", json.dumps(held | {"driver": "bbbbb", "beat": 1}).encode())


def a_manifest(shard: int, attempt: str, run: str = "") -> tuple[CommitInfo, bytes]:
    info = CommitInfo(shard, attempt, "card", "node", None, 0, 0, 0, ThroughputTotals(), run)
    return info, manifest.build([], pa.table({}), {}, {}, 0, info)


def test_a_commit_looks_at_the_lease_last(output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it took to find that the shard is not committed."""
    read = Ledger.read_commit

    def slow(self: Ledger, shard: int) -> Any:
        commit = read(self, shard)
        take_over(output)
        return commit

    monkeypatch.setattr(Ledger, "read_commit", slow)
    records = Ledger(output, first)
    with pytest.raises(LeaseLost):
        records.commit(*a_manifest(3, "aaaaa1"))
    assert output.names("manifest") == []
    assert not records.in_doubt, "nothing was sent"


def test_a_manifest_that_arrives_late_takes_no_other_s_place(
    output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk held the first driver's write for so long that it was given up, and another driver committed."""
    arrives, has_arrived, sync = threading.Event(), threading.Event(), disk.sync

    def slow(path: Path) -> None:
        if "000003.parquet" in path.name:
            arrives.wait(30)
        sync(path)

    def write_whole(*arguments: Any, **options: Any) -> bool:
        try:
            return disk.write_whole(*arguments, **options)
        finally:
            if arrives.is_set():
                has_arrived.set()

    monkeypatch.setattr(disk, "sync", slow)
    monkeypatch.setattr(store, "write_whole", write_whole)
    monkeypatch.setattr(ledger, "MANIFEST_TIMEOUT_S", 0.1)
    output.retry_timeout_s = 0.0
    records = Ledger(output, first)
    with pytest.raises(StorageError, match="no answer"):
        records.commit(*a_manifest(3, "aaaaa1"))
    assert records.in_doubt == {"aaaaa1"}
    other, data = a_manifest(3, "bbbbb1")
    path = Path(output.full(manifest_path(3)))
    path.write_bytes(data)
    arrives.set()
    assert has_arrived.wait(60)
    assert path.read_bytes() == data
    assert Ledger(output, first).commit(*a_manifest(3, "aaaaa2")) is False
    assert Ledger(output, first).commit(other, data) is True


def test_a_manifest_that_lands_while_the_run_is_summed_up_keeps_its_images(
    output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit was on its way when the run ended, and the other manifests had been listed without it."""
    arrives, sync, remove = threading.Event(), disk.sync, Leftovers.remove
    records = Ledger(output, first)
    output.put("images/000003-aaaaa1/00000000-00.png", b"image")

    def slow(path: Path) -> None:
        if "000003.parquet" in path.name:
            arrives.wait(30)
        sync(path)

    def remove_late(self: Leftovers, *arguments: Any, **named: Any) -> None:
        arrives.set()  # the manifests have been listed
        commit.join()
        remove(self, *arguments, **named)

    monkeypatch.setattr(disk, "sync", slow)
    monkeypatch.setattr(Leftovers, "remove", remove_late)
    records.in_doubt.add("aaaaa1")
    commit = threading.Thread(target=records.commit, args=a_manifest(3, "aaaaa1"))
    commit.start()
    record = RunInfo({}, {}, {}, "", rows=1, images=1)
    job: Any = SimpleNamespace(dataset=None, config=SimpleNamespace(format="files"))
    run = Run(job, records, first, record, [], lambda: pytest.fail("no card is needed"), Commits(records, "aaaaa"))
    run.leftovers.begun("aaaaa1", 3, "card")
    write_summary(run, CommitTotals(), Ended("max_failed"))
    assert arrives.is_set()
    assert output.names("manifest") == ["000003.parquet"]
    assert output.names("images") == ["000003-aaaaa1", "metadata.parquet"]


def test_a_shard_whose_manifest_is_not_listed_yet_loses_no_image(
    output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier driver committed a shard that makes rows again; this one lost its own commit of it, and the last
    listing lags. The rows of the others add up all the same."""
    records = Ledger(output, first)
    bucket = Bucket(64, 64, 1, 1.0)
    plan = [Shard(0, 0, 0, 1, bucket, 1, 1), Shard(1, 0, 0, 1, bucket, 1, 1, only=(0,), failed_before=1)]

    def made(shard: int, attempt: str) -> tuple[CommitInfo, bytes]:
        info = CommitInfo(shard, attempt, "card", "node", None, 1, 0, 0, ThroughputTotals(), "", shard == 1)
        return info, manifest.build([], pa.table({}), {}, {}, 0, info)

    for shard, attempt in ((0, "bbbbb1"), (1, "bbbbb2")):
        assert records.commit(*made(shard, attempt))
        output.put(f"images/{shard:06d}-{attempt}/x.png", b"image")
    entries = Storage.entries
    monkeypatch.setattr(
        Storage,
        "entries",
        lambda self, path: {name: each for name, each in entries(self, path).items() if name != "000001.parquet"},
    )
    job: Any = SimpleNamespace(
        dataset=SimpleNamespace(files=[SimpleNamespace(first_row=0)], columns={}),
        config=SimpleNamespace(format="files"),
    )
    record = RunInfo({}, {}, {}, "", rows=1, images=1)
    run = Run(job, records, first, record, plan, lambda: pytest.fail("no card is needed"), Commits(records, "aaaaa"))
    run.commits.refresh()
    assert not records.commit(*made(1, "aaaaa1"))
    known = CommitTotals()
    for commit in run.commits.in_order():
        known.add(commit.info)
    summary = write_summary(run, known, Ended(None))
    assert summary["reason"] == "no manifest of 1 shard is in place, the first of which is 1"
    assert output.names("images") == ["000000-bbbbb1", "000001-bbbbb2", "metadata.parquet"]


def test_a_run_whose_leftovers_may_not_be_removed_is_complete(
    output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise StorageError("403: s3:DeleteObject is not allowed", refused=True)

    records = Ledger(output, first)
    assert records.commit(*a_manifest(0, "aaaaa1"))
    job: Any = SimpleNamespace(
        dataset=SimpleNamespace(files=[SimpleNamespace(first_row=0)], columns={}),
        config=SimpleNamespace(format="files"),
    )
    plan = [Shard(0, 0, 0, 1, Bucket(64, 64, 1, 1.0), 1, 1)]
    record = RunInfo({}, {}, {}, "", rows=0, images=0)
    run = Run(job, records, first, record, plan, lambda: pytest.fail("no card is needed"), Commits(records, "aaaaa"))
    monkeypatch.setattr(Leftovers, "remove", refused)
    monkeypatch.setattr(finalize, "_join", lambda run: {})
    assert write_summary(run, CommitTotals(), Ended(None))["state"].startswith("complete")
    assert "s3:DeleteObject is not allowed" in caplog.text


def test_a_manifest_that_is_refused_is_not_in_doubt(
    output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    records = Ledger(output, first)
    monkeypatch.setattr(disk, "sync", full)
    with pytest.raises(StorageError, match="No space left"):
        records.commit(*a_manifest(3, "aaaaa1"))
    assert not records.in_doubt


@pytest.mark.parametrize(("last", "tried"), [(errno.EIO, 1), (errno.ENOSPC, 2)])
def test_a_manifest_whose_first_try_may_have_landed_stays_in_doubt(
    last: int, tried: int, output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the store says of the last one: a try that has failed may still land, and one that is refused can't."""
    tries: list[int] = []

    def failing(path: Path) -> None:
        tries.append(1)
        raise OSError(last if len(tries) == tried else errno.EIO, "no")

    output.retry_timeout_s = 0.0 if tried == 1 else 30.0
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(disk, "sync", failing)
    records = Ledger(output, first)
    with pytest.raises(StorageError):
        records.commit(*a_manifest(3, "aaaaa1"))
    assert len(tries) == tried
    assert records.in_doubt == {"aaaaa1"}


def test_manifests_are_read_ahead_no_further_than_is_said() -> None:
    """Else all manifests of a run would be in memory at once."""
    read: list[int] = []
    with ThreadPoolExecutor(1) as pool:

        def reads(number: int) -> int:
            read.append(number)
            return number

        numbers = reader._ahead(pool, reads, range(1000))
        assert [next(numbers) for _ in range(3)] == [0, 1, 2]
        pool.submit(int).result()
        assert len(read) == 4 * reader.READ_THREADS + 2
        assert list(numbers) == list(range(3, 1000))


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_a_record_with_threads_that_can_t_be_is_refused(threads: object, output: Storage) -> None:
    record = RunInfo({"device": "cpu"}, {"threads": threads}, {}, "now", rows=1, images=1)
    output.put("run.json", json.dumps(record.__dict__).encode())
    with pytest.raises(InputError, match="its threads are no count"):
        OutputReader(output).run()


@pytest.mark.parametrize("run", ["", "another run"])
def test_a_torn_manifest_and_that_of_another_run_are_no_commit(run: str, output: Storage, first: LeaseKeeper) -> None:
    records = Ledger(output, first)
    records._info = RunInfo({}, {}, {}, "", 4, 4, run_id="this run")
    info, data = a_manifest(3, "aaaaa1", run)
    output.put(manifest_path(3), data if run else data[:100])
    assert list(records.commits()) == []
    info, data = a_manifest(3, "aaaaa2", "this run")
    assert records.commit(info, data) is True
    assert [commit.attempt for commit, _ in records.commits()] == ["aaaaa2"]


def test_nobody_writes_or_removes_once_another_drives(
    output: Storage, first: LeaseKeeper, prompts: Path, tmp_path: Path
) -> None:
    config = JobConfig(prompts=str(prompts), output=str(tmp_path / "out"), device="simulated")
    records = Ledger(output, first)
    job = resolve(config)
    info, shards = begin_run(records, job, 1)
    output.put(manifest_path(3), a_manifest(3, "aaaaa1", info.run_id)[1])
    output.put("images/000004-aaaaa2/00000001-00.png", b"image")
    commits = Commits(records, "aaaaa")
    commits.refresh()
    take_over(output)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    actions: list[Callable[[], object]] = [
        lambda: records.put_plan(shards[:1]),
        lambda: records.put_json("summary.json", {}),
        lambda: join_manifests(commits, {}),
        lambda: remove_left(records, left_by_attempts(output), {}),
        lambda: records.commit(*a_manifest(5, "aaaaa3")),
        lambda: clear(records),
    ]
    for action in actions:
        with pytest.raises(LeaseLost):
            action()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_run_whose_run_json_is_gone_is_not_planned_anew(
    output: Storage, first: LeaseKeeper, prompts: Path, tmp_path: Path
) -> None:
    job = resolve(JobConfig(prompts=str(prompts), output=str(tmp_path / "out"), device="simulated"))
    records = Ledger(output, first)
    output.put(manifest_path(3), a_manifest(3, "aaaaa1")[1])
    with pytest.raises(InputError, match=r"has manifests of a run and no run\.json"):
        begin_run(records, job, 1)
    clear(records)
    assert begin_run(records, job, 1)[0].run_id


@pytest.mark.usefixtures("thread_cards")
def test_what_a_driver_has_committed_it_never_removes(
    prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end a listing lacks a manifest, or all of them."""
    entries = Ledger.manifest_entries
    job = JobConfig(
        prompts=str(prompts), output=str(tmp_path / "out"), device="simulated", shard_size=16, cards=2,
        simulated={"batch_seconds": 0.0},
    )  # fmt: skip

    def sum_up(*arguments: Any) -> Any:
        whole = entries(arguments[0].ledger)
        for listed in ({}, {shard: entry for shard, entry in whole.items() if shard}):
            monkeypatch.setattr(Ledger, "manifest_entries", lambda self, listed=listed: listed)
            with pytest.raises(RunStopped, match="are gone or torn, the first of shard 0"):
                product(*arguments)
        monkeypatch.setattr(Ledger, "manifest_entries", entries)
        return product(*arguments)

    product = finalize.sum_up
    monkeypatch.setattr(runner, "sum_up", sum_up)
    result = runner.run(job, address=cluster)
    assert result.summary["images"] == 100
    assert len(list((tmp_path / "out/images").glob("*/*.png"))) == 100


def test_a_driver_that_has_not_counted_up_for_a_while_commits_nothing(
    output: Storage, clock: Clock, first: LeaseKeeper
) -> None:
    output.retry_timeout_s = 0.0
    clock.now += lease.RENEW_DEADLINE_S - 1
    first.ensure_held()
    clock.now += 2
    with pytest.raises(StorageError, match="the lease can't be kept up"):
        first.ensure_held()


def test_who_writes_the_lease_last_has_it(output: Storage, clock: Clock) -> None:
    clock.meanwhile = lambda: take_over(output)
    keeper = LeaseKeeper(output, "aaaaa")
    with pytest.raises(InputError, match="has just started to drive this run"):
        keeper.take()
    keeper._renewing.join(10)
    assert not keeper._renewing.is_alive(), "it renews a lease that it has lost"
    assert not keeper.holds()


def test_what_fails_while_the_lease_settles_gives_it_back(output: Storage, clock: Clock) -> None:
    """As where no cluster answers: the next command need not wait until the lease is stale."""

    def no_cluster() -> None:
        raise InputError("no Ray cluster answers")

    keeper = LeaseKeeper(output, "aaaaa")
    with pytest.raises(InputError, match="no Ray cluster"):
        keeper.take(meanwhile=no_cluster)
    keeper.release()
    held = read_lease(output)
    assert held is not None
    assert held.released


def test_a_lease_that_can_t_be_read_may_have_a_holder(output: Storage, clock: Clock, first: LeaseKeeper) -> None:
    whole, began = output.get("lease.json") or b"", clock.now

    def written_at_last() -> None:
        if clock.now - began > holder.LEASE_TTL_S - 5:
            output.put("lease.json", whole)

    clock.meanwhile = written_at_last
    output.put("lease.json", whole[:40])
    with pytest.raises(InputError, match="drives this run"):
        LeaseKeeper(output, "bbbbb").take()
    first.forget()
    clock.meanwhile = lambda: None
    output.put("lease.json", whole[:40])
    lines: list[str] = []
    began = clock.now
    LeaseKeeper(output, "ccccc").take(lines.append)
    assert clock.now - began > holder.LEASE_TTL_S
    assert [line[:25] for line in lines] == ["lease.json can't be read;"]


@pytest.mark.parametrize("over", ["released", "gone", "silent"])
def test_an_old_word_of_a_driver_that_is_over_ends_no_other(
    over: str, output: Storage, clock: Clock, first: LeaseKeeper
) -> None:
    """A store may answer with what lease.json said a while ago."""
    if over == "released":
        first.release()
    elif over == "gone":
        first.forget()
    else:
        elsewhere(output)
    old = output.get("lease.json") or b""
    second = LeaseKeeper(output, "ccccc")

    def old_word() -> None:
        """What was written a moment ago is not there yet when it is read back."""
        if output.get("lease.json") != old:
            output.put("lease.json", old)

    clock.meanwhile = old_word
    assert not refused(second.take)
    clock.meanwhile = lambda: None
    output.put("lease.json", old)
    assert not lost(second)
    assert Ledger(output, second).commit(*a_manifest(3, "ccccc1")) is True


def elsewhere(output: Storage) -> None:
    """Nobody here can tell whether the holder lives."""
    held = json.loads(output.get("lease.json") or b"")
    output.put("lease.json", json.dumps(held | {"machine": "another"}).encode())


def lost(keeper: LeaseKeeper) -> bool:
    try:
        keeper.ensure_held()
    except LeaseLost:
        return True
    return False


def refused(take: Callable[[], None]) -> bool:
    try:
        take()
    except InputError:
        return True
    return False


def before_write(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Something happens between the look at the lease and the next file that is written."""
    write, times = disk.write_whole, iter([True])

    def late(path: Path, *rest: Any, **options: Any) -> bool:
        if next(times, False):
            happens()
        return write(path, *rest, **options)

    monkeypatch.setattr(store, "write_whole", late)


def test_a_renewal_that_comes_late_takes_the_lease_from_nobody(
    output: Storage, clock: Clock, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a driver that stood still before it wrote."""
    monkeypatch.setattr(lease, "RENEW_INTERVAL_S", 0.0)

    def stand_still() -> None:
        clock.now += lease.LEASE_TIMEOUT_S
        take_over(output)

    before_write(monkeypatch, stand_still)
    first._renew()
    held = read_lease(output)
    assert held is not None
    assert held.driver == "bbbbb"
    assert not first.holds()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, output: Storage) -> None:
    """Tries at taking the lease are as short as they are for users, and as many as a loaded machine needs."""
    monkeypatch.setattr(lease, "TAKE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(lease, "SETTLE_INTERVAL_S", 1.5)
    output.retry_timeout_s = 60.0


@pytest.mark.usefixtures("short")
def test_of_two_that_take_the_lease_together_the_one_that_stands_still_gets_nothing(
    output: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other has written its own and read it back meanwhile, and begins the run."""
    one, late = LeaseKeeper(output, "aaaaa"), LeaseKeeper(output, "bbbbb")
    before_write(monkeypatch, one.take)
    with pytest.raises(InputError, match="drives this run"):
        late.take()
    assert not lost(one)


@pytest.mark.usefixtures("short")
def test_where_every_write_takes_long_it_is_read_back_later(
    output: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of another driver takes three seconds, which would not be there to be read after one and a half."""
    write, landed = disk.write_whole, 0.0

    def slow(path: Path, *rest: Any, **options: Any) -> bool:
        nonlocal landed
        clock.now += 3.0
        written = write(path, *rest, **options)
        landed = clock.now
        return written

    monkeypatch.setattr(store, "write_whole", slow)
    LeaseKeeper(output, "aaaaa").take()
    assert clock.now - landed > lease.LEASE_TIMEOUT_S


@pytest.mark.usefixtures("short")
def test_what_is_left_behind_of_a_try_takes_the_lease_from_nobody(
    output: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs until its driver has been refused."""
    one, late = LeaseKeeper(output, "aaaaa"), LeaseKeeper(output, "bbbbb")
    hangs, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    write, read, first = disk.write_whole, LeaseKeeper._read, iter([True])

    def hang(path: Path, *rest: Any, **options: Any) -> bool:
        if not next(first, False):
            return write(path, *rest, **options)
        hangs.set()
        goes_on.wait(60)
        try:
            return write(path, *rest, **options)
        finally:
            ended.set()

    def read_when_taken(self: LeaseKeeper) -> Any:
        if self is late and hangs.is_set() and not one.holds():
            one.take()
        return read(self)

    monkeypatch.setattr(lease, "LEASE_TIMEOUT_S", 0.2)  # of the try that hangs, in real time
    monkeypatch.setattr(store, "write_whole", hang)
    monkeypatch.setattr(LeaseKeeper, "_read", read_when_taken)
    with pytest.raises(InputError, match="drives this run"):
        late.take()
    goes_on.set()
    assert ended.wait(60)
    held = read_lease(output)
    assert held is not None
    assert held.driver == "aaaaa"


def test_a_write_that_comes_too_late_is_not_begun() -> None:
    """Which stores can't be kept from doing once it is under way."""
    begun = []

    async def write() -> None:
        begun.append(1)

    with pytest.raises(TimeoutError, match="too late to begin"):
        retry.run_or_cancel(write(), asyncio.new_event_loop(), 1.0, lambda: False)
    assert begun == []


@pytest.mark.parametrize("over", ["unsettled", "forced", "silent"])
def test_a_lease_that_a_living_process_does_not_renew_blocks_nobody(
    over: str, output: Storage, clock: Clock, first: LeaseKeeper
) -> None:
    """Its driver is over and could not give it back, or a write of it may still land."""
    if over == "unsettled":
        first.release(lambda: False)
    elif over == "forced":
        first.forget(lambda: False)
    else:
        first._over.set()
        clock.now += holder.LEASE_TTL_S
    began, second = clock.now, LeaseKeeper(output, "bbbbb")
    second.take()
    assert clock.now - began > holder.LEASE_TTL_S
    assert second.follows_silent
    assert not lost(second)


def test_a_lease_that_is_not_there_for_a_moment_has_a_holder(output: Storage, clock: Clock, first: LeaseKeeper) -> None:
    elsewhere(output)
    held = json.loads(output.get("lease.json") or b"")
    began = clock.now

    def absent_for_a_while() -> None:
        output.remove("lease.json")
        if clock.now - began > holder.LEASE_TTL_S / 2:
            output.put("lease.json", json.dumps(held | {"beat": 9}).encode())

    clock.meanwhile = absent_for_a_while
    with pytest.raises(InputError, match="drives this run"):
        LeaseKeeper(output, "bbbbb").take()


def test_drivers_that_have_begun_are_past_holders(output: Storage, clock: Clock, first: LeaseKeeper) -> None:
    first.release()
    for driver in ("aaaaa", "bbbbb", "ccccc"):
        output.put(timeline_path(driver, 0), b"")
    keeper = LeaseKeeper(output, "ccccc")
    keeper.take()
    assert keeper.past_holders == {"aaaaa", "bbbbb"}


def test_a_lease_of_an_older_version_has_a_holder(output: Storage, clock: Clock, first: LeaseKeeper) -> None:
    held = json.loads(output.get("lease.json") or b"")
    del held["renewed_s"]
    output.put("lease.json", json.dumps(held).encode())
    clock.now += 2 * holder.LEASE_TTL_S
    with pytest.raises(InputError, match="drives this run"):
        LeaseKeeper(output, "bbbbb").take()


def test_one_sight_of_another_driver_is_looked_at_twice(output: Storage, clock: Clock, first: LeaseKeeper) -> None:
    own = output.get("lease.json") or b""
    take_over(output)
    clock.meanwhile = lambda: output.put("lease.json", own)
    assert not lost(first)
    clock.meanwhile = lambda: None
    take_over(output)
    assert lost(first)
    output.put("lease.json", own)
    assert lost(first), "once lost, it stays so"


def test_a_driver_that_was_silent_and_counts_up_again_is_not_over(
    output: Storage, clock: Clock, first: LeaseKeeper
) -> None:
    elsewhere(output)
    held = json.loads(output.get("lease.json") or b"")
    second, began = LeaseKeeper(output, "ccccc"), clock.now
    second.take()
    assert holder.LEASE_TTL_S < clock.now - began < holder.LEASE_TTL_S + 3 * lease.LEASE_POLL_INTERVAL_S
    assert not lost(second)
    output.put("lease.json", json.dumps(held | {"beat": held["beat"] + 1}).encode())
    assert lost(second)


def test_a_holder_is_alive_when_it_counts_up_and_not_when_it_lets_go_or_an_old_word_of_it_comes(
    output: Storage, clock: Clock, first: LeaseKeeper
) -> None:
    elsewhere(output)
    held = json.loads(output.get("lease.json") or b"") | {"beat": 7}

    def take(driver: str, **later: Any) -> LeaseKeeper:
        output.put("lease.json", json.dumps(held).encode())
        keeper = LeaseKeeper(output, driver)
        keeper.take(lambda line: output.put("lease.json", json.dumps(held | later).encode()))
        return keeper

    with pytest.raises(InputError, match="drives this run"):
        take("bbbbb", beat=8)
    began = clock.now
    assert take("ccccc", beat=8, released=True).past_holders == {"aaaaa"}
    assert clock.now - began < holder.LEASE_TTL_S / 2, "it did not wait"
    assert take("ddddd", beat=6).past_holders == {"aaaaa"}


def test_no_beat_comes_after_the_release(output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    first.release()
    held = read_lease(output)
    assert held is not None
    assert held.released
    with pytest.raises(LeaseLost):
        first.ensure_held()
    monkeypatch.setattr(lease, "RENEW_INTERVAL_S", 0.0)
    began, goes_on, put = threading.Event(), threading.Event(), Storage.put

    def slow(self: Storage, path: str, data: bytes, *rest: Any) -> None:
        if threading.current_thread().name == "lease":
            began.set()
            goes_on.wait(60)
        put(self, path, data, *rest)
        if began.is_set():
            goes_on.set()  # whoever releases has not waited for it

    monkeypatch.setattr(Storage, "put", slow)
    second = LeaseKeeper(output, "ccccc")
    second.take()
    assert began.wait(60)
    beats = second._renewing
    wait_for_beat = beats.join

    def join() -> None:
        goes_on.set()
        wait_for_beat()

    monkeypatch.setattr(beats, "join", join)
    second.release()
    wait_for_beat(60)
    held = read_lease(output)
    assert held is not None
    assert (held.driver, held.released, held.dead) == ("ccccc", True, ("aaaaa",))


def test_an_answer_to_a_recall_that_is_lost_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaudi_batch.driver.calls.RETRY_INTERVAL_S", 0.0)
    asked: list[Any] = []

    class Actor:
        recall = assign = property(lambda self: self)

        async def remote(self, *arguments: Any) -> bool:
            asked.append(arguments[-1])
            if len(asked) < 3:
                raise ActorUnavailableError("its answer is lost", b"an id of 16 byte")
            return True

    assert asyncio.run(ask_back(Actor(), "aaaaa1")) is True
    assert asked == ["aaaaa1"] * 3
    asked.clear()
    shard = Shard(0, 0, 0, 4, Bucket(64, 64, 20, 2.0), 4, 4)
    task = ShardTask(shard, "aaaaa2")
    asyncio.run(send(Slot(0), Actor(), task))
    assert asked == [task] * 3


@pytest.mark.parametrize("over", ["released", "gone"])
def test_one_old_word_of_a_driver_that_is_over_gives_nobody_a_run_that_another_drives(
    over: str, output: Storage, first: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers once with what lease.json said before the second driver took it."""
    first.release() if over == "released" else first.forget()
    answers = [output.get("lease.json")]
    second, get = LeaseKeeper(output, "bbbbb"), Storage.get
    second.take()
    monkeypatch.setattr(Storage, "get", lambda self, path: answers.pop() if answers else get(self, path))
    assert refused(LeaseKeeper(output, "ccccc").take)
    assert not answers
    assert not lost(second)


def test_a_driver_counts_up_while_it_finds_out_what_its_store_can(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may take as long as the job's patience."""
    monkeypatch.setattr(lease, "RENEW_INTERVAL_S", 0.0)

    def beat() -> int:
        held = read_lease(output)
        assert held is not None
        return held.beat

    def slow(self: Storage, *_: Any) -> None:
        before = beat()
        wait_until(lambda: beat() >= before + 3)
        slow_ones.append(before)

    slow_ones: list[int] = []
    monkeypatch.setattr(Storage, "find_out_create", slow)
    keeper = LeaseKeeper(output, "aaaaa")
    keeper.take()
    assert slow_ones
    keeper.release()


def test_a_driver_that_can_t_find_out_what_its_store_can_counts_up_no_more(
    output: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Storage, *_: Any) -> None:
        raise StorageError("it does not answer")

    monkeypatch.setattr(Storage, "find_out_create", fails)
    keeper = LeaseKeeper(output, "aaaaa")
    with pytest.raises(StorageError, match="it does not answer"):
        keeper.take()
    keeper._renewing.join(10)
    assert not keeper._renewing.is_alive()
