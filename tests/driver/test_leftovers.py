"""What attempts have left that were not committed is removed, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gaudi_batch.driver import finalize, leftovers
from gaudi_batch.driver.leftovers import Leftovers
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import image_path, manifest_path, throughput_path, timeline_path
from gaudi_batch.output.cleanup import Left, left_by_attempts, remove_parts
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.storage.store import Storage

COMMITTED = {0: "aaaaa1", 1: "ccccc2"}
OTHERS = ["images/notes.txt", "images/000009-zzzzz1/x.png", "throughput/card/readme.md"]
"""Of nobody that this run knows."""


class Unfenced:
    def ensure_held(self) -> None:
        """Always."""

    def holds(self) -> bool:
        """Always."""
        return True


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Attempts of two drivers that are over, aaaaa and bbbbb, and of this one, ccccc."""
    storage = Storage(str(tmp_path / "out"))
    attempts = [(0, "aaaaa1"), (1, "aaaaa2"), (1, "ccccc2"), (2, "bbbbb1"), (2, "ccccc3"), (3, "ccccc4")]
    for shard, attempt in attempts:
        storage.put(image_path(shard, attempt, shard, 0, "png"), b"image")
        storage.put(throughput_path("card", shard, attempt), b"line")
    for path in OTHERS:
        storage.put(path, b"mine")
    return Ledger(storage, Unfenced())


def kept(ledger: Ledger) -> set[str]:
    """The attempts of which something is there; of each both or none."""
    root = Path(ledger.storage.root)
    assert all((root / path).read_bytes() == b"mine" for path in OTHERS)
    images = {path.parent.name[7:] for path in root.glob("images/*/*.png")} - {"zzzzz1"}
    lines = {path.stem[7:] for path in root.glob("throughput/card/*.jsonl")}
    assert images == lines
    return images


def of_run(ledger: Ledger, committed: dict[int, str] = COMMITTED) -> Leftovers:
    made = Leftovers(ledger, "ccccc", {"aaaaa", "bbbbb"}, committed.get)
    for attempt, shard in (("ccccc2", 1), ("ccccc3", 2), ("ccccc4", 3), ("ccccc5", 4)):
        made.begun(attempt, shard, "card")
    return made


def test_own_attempts_are_removed_by_name_unless_they_are_committed_or_in_doubt(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "names", lambda *_: pytest.fail("it lists"))
    of_run(ledger).remove(COMMITTED, {"ccccc4"}, is_complete=False)
    assert kept(ledger) == {"aaaaa1", "aaaaa2", "bbbbb1", "ccccc2", "ccccc4"}


def test_an_attempt_that_has_left_nothing_is_not_looked_for(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    own = of_run(ledger)
    for attempt in ("ccccc2", "ccccc3", "ccccc5"):
        own.settled(attempt)
    removed: list[str] = []
    monkeypatch.setattr(Ledger, "remove", lambda self, path: removed.append(path))
    own.remove(COMMITTED, (), is_complete=False)
    assert removed == ["images/000003-ccccc4", "throughput/card/000003-ccccc4.jsonl"]


def test_a_probe_that_was_left_is_removed(ledger: Ledger) -> None:
    ledger.storage.put("images/000007-ccccc0/probe", b"x")
    own = of_run(ledger)
    own.probed("ccccc0", 7)
    own.remove(COMMITTED, (), is_complete=False)
    assert not (Path(ledger.storage.root) / "images/000007-ccccc0").exists()


class Looked:
    """Counts listings of all images, and tells when one is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.done = 0, threading.Event()
        listed = left_by_attempts

        def counted(storage: Storage) -> Iterator[Left]:
            self.count += 1
            yield from listed(storage)
            self.done.set()

        monkeypatch.setattr("gaudi_batch.driver.leftovers.left_by_attempts", counted)


def test_what_drivers_before_have_left_is_looked_for_while_the_run_goes_on(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "QUIET_S", 0.0)
    looked = Looked(monkeypatch)
    run = of_run(ledger)
    run.list_meanwhile()
    assert looked.done.wait(60)
    assert kept(ledger) == {"aaaaa1", "aaaaa2", "bbbbb1", "ccccc2", "ccccc3", "ccccc4"}, "until the run is complete"
    run.remove(COMMITTED | {2: "bbbbb1"}, (), is_complete=True)
    assert kept(ledger) == {"aaaaa1", "bbbbb1", "ccccc2"}, "bbbbb1 was committed after that"
    assert looked.count == 1


def test_a_run_that_is_over_soon_looks_at_its_end(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = Looked(monkeypatch)
    run = of_run(ledger)
    run.list_meanwhile()
    run.remove(COMMITTED, (), is_complete=True)
    assert kept(ledger) == {"aaaaa1", "ccccc2"}
    assert looked.count == 1


def test_where_storage_fails_meanwhile_the_end_looks_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "QUIET_S", 0.0)
    listed, failed = left_by_attempts, threading.Event()

    def fail_once(storage: Storage) -> Iterator[Left]:
        if not failed.is_set():
            failed.set()
            raise StorageError("it does not answer")
        return listed(storage)

    monkeypatch.setattr("gaudi_batch.driver.leftovers.left_by_attempts", fail_once)
    run = of_run(ledger)
    run.list_meanwhile()
    assert failed.wait(60)
    run.remove(COMMITTED, (), is_complete=True)
    assert kept(ledger) == {"aaaaa1", "ccccc2"}


def test_a_run_that_stops_leaves_what_others_have_left(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may be alive, and commit."""
    monkeypatch.setattr("gaudi_batch.driver.leftovers.left_by_attempts", lambda *_: pytest.fail("it lists"))
    run = of_run(ledger)
    run.list_meanwhile()
    run.remove(COMMITTED, (), is_complete=False)
    assert kept(ledger) == {"aaaaa1", "aaaaa2", "bbbbb1", "ccccc2"}


@pytest.mark.parametrize("begins", ["before", "meanwhile"])
def test_a_driver_that_no_lease_names_is_known_by_its_timeline(begins: str, ledger: Ledger) -> None:
    """It took the lease at the same moment and lost it, or lease.json was lost."""
    own = of_run(ledger)
    if begins == "meanwhile":
        own.list_meanwhile()
    ledger.storage.put(image_path(3, "ddddd1", 3, 0, "png"), b"image")
    ledger.storage.put(throughput_path("card", 3, "ddddd1"), b"line")
    for driver in ("ccccc", "ddddd"):
        ledger.storage.put(timeline_path(driver, 0), b"")
    if begins == "before":
        own.list_meanwhile()
    own.remove(COMMITTED, (), is_complete=True)
    assert kept(ledger) == {"aaaaa1", "ccccc2"}


def test_a_run_that_ends_before_it_lists_leaves_no_thread(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = Looked(monkeypatch)
    own = of_run(ledger)
    own.list_meanwhile()
    own.close()
    own._thread.join(60)
    assert not own._thread.is_alive()
    assert looked.count == 0


def test_files_that_were_being_written_are_removed_and_nobody_elses(ledger: Ledger) -> None:
    root = Path(ledger.storage.root)
    for place in ("rollup", "timeline", "log", "manifest.parquet"):
        (root / place).mkdir()
    ledger.storage.put(manifest_path(0), b"a manifest")
    whole = [
        "run.json",
        "manifest/000000.parquet",
        "throughput/card/000000-aaaaa1.jsonl",
        "timeline/aaaaa-000001.jsonl",
        "log/aaaaa-000001.log",
        "rollup/aaaaa000001.index.parquet",
        "manifest.parquet/aaaaa000001.parquet",
    ]
    parts = [root / name.replace(name.split("/")[-1], f".{name.split('/')[-1]}.part-0a1b2c3d") for name in whole]
    others = [root / f".{name}.part-0a1b2c3d" for name in ("lease.json", "stop.json")]
    others += [root / "log/.bbbbb-000001.log.part-0a1b2c3d"]
    others += [root / ".notes.txt.part-0a1b2c3d", root / "manifest/.000000.parquet.part-1", root / "throughput/a file"]
    for path in (*parts, *others):
        path.write_bytes(b"half")
    remove_parts(ledger, "bbbbb")
    assert [path for path in (*parts, *others) if path.exists()] == others
    assert (root / manifest_path(0)).read_bytes() == b"a manifest"


def test_at_the_end_of_a_run_roll_ups_of_drivers_that_only_the_timeline_names_go_too(ledger: Ledger) -> None:
    """The lease may have lost a driver's name; what it has rolled up without an index is of no use."""
    ledger.storage.put(timeline_path("eeeee", 0), b"{}")
    stale, others = "rollup/eeeee000001.parquet", "rollup/zzzzz000001.parquet"
    for name in (stale, others):
        ledger.storage.put(name, b"rows")
    made = of_run(ledger)
    made.remove(COMMITTED, (), is_complete=True)
    job = SimpleNamespace(dataset=None)
    commits = Commits(ledger, "ccccc")
    run: Any = SimpleNamespace(ledger=ledger, leftovers=made, latest_shard_of_row={}, plan=[], job=job, commits=commits)
    run.lease = SimpleNamespace(driver="ccccc")
    finalize._remove_rest(run)
    assert ledger.storage.get(stale) is None
    assert ledger.storage.get(others) == b"rows", "of nobody that this run knows"
