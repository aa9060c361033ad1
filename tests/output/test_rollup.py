"""Manifests are read once and rolled up as a run goes, and what storage lists stays the truth."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from helpers import Unfenced
from test_joined import commit, rows_of

from gaudi_batch.driver.result import RunResult
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import JOINED, ROLLUPS, manifest_path
from gaudi_batch.output import commits as commits_module
from gaudi_batch.output import joined
from gaudi_batch.output.cleanup import clear
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.joined import join_manifests
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.rollup import counting, index_path, keep_latest, rows_path
from gaudi_batch.storage.listing import Entry
from gaudi_batch.storage.store import Storage

SHARDS = 10
ROWS = 4
"""Of each shard."""


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Of a run of ten shards, of which three make a roll-up; one row of each fails."""
    monkeypatch.setattr(commits_module, "ROLLUP_SHARDS", 3)
    return filled(Ledger(Storage(str(tmp_path / "out")), Unfenced()))


def filled(ledger: Ledger) -> Ledger:
    for shard in range(SHARDS):
        commit(ledger, shard, shard_rows(shard))
    return ledger


def shard_rows(shard: int) -> Any:
    return rows_of(range(ROWS * shard, ROWS * shard + ROWS), seed=[None, None, None, -1])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The manifests that are read."""
    paths: list[str] = []
    get = Storage.get

    def noted(storage: Storage, path: str) -> bytes | None:
        if path.startswith("manifest/"):
            paths.append(path)
        return get(storage, path)

    monkeypatch.setattr(Storage, "get", noted)
    return paths


def known(ledger: Ledger, driver: str = "aaaaa") -> Commits:
    commits = Commits(ledger, driver)
    commits.refresh()
    return commits


def rolled_up(ledger: Ledger) -> Commits:
    commits = known(ledger)
    commits.roll_up_rest()
    return commits


def rows(commits: Commits) -> list[tuple[int, int, str]]:
    tables = pa.concat_tables(commits.tables({})).select(["row", "shard", "status"])
    return sorted(zip(*tables.to_pydict().values(), strict=True))


def test_whoever_resumes_reads_the_roll_ups_and_what_came_after(ledger: Ledger, read: list[str]) -> None:
    first = rolled_up(ledger)
    assert sorted(read) == [manifest_path(shard) for shard in range(SHARDS)], "each was read once"
    assert len(ledger.storage.names(ROLLUPS)) == 2 * 4
    commit(ledger, SHARDS, shard_rows(SHARDS))
    read.clear()
    second = known(ledger, "bbbbb")
    assert read == [manifest_path(SHARDS)]
    again = known(filled(Ledger(Storage(str(Path(ledger.storage.place).parent / "other")), Unfenced())))
    for one in (first, again):
        assert {shard: replaced(one, shard) for shard in range(SHARDS)} == {
            shard: replaced(second, shard) for shard in range(SHARDS)
        }
    assert rows(second) == sorted([*rows(first), *((40 + n, 10, "ok" if n < 3 else "failed") for n in range(ROWS))])


def replaced(commits: Commits, shard: int) -> object:
    commit = commits.by_shard[shard]
    failed = commit.failed.to_pylist() if commit.failed is not None else None
    return commit.info.attempt, commit.info.rows, commit.info.sums, commit.info.failed_rows, failed


def test_what_a_driver_commits_is_rolled_up_as_it_goes(ledger: Ledger, read: list[str]) -> None:
    commits = rolled_up(ledger)
    for shard in range(SHARDS, SHARDS + 3):
        commit(ledger, shard, shard_rows(shard))
        data = ledger.storage.get(manifest_path(shard))
        assert data is not None
        failed = commits.add(info_of(ledger, shard), data)
        assert failed is not None
        assert failed.column("row").to_pylist() == [ROWS * shard + 3]
    commits.refresh()
    read.clear()
    assert sorted(known(ledger, "bbbbb").by_shard) == list(range(SHARDS + 3))
    assert read == []


def info_of(ledger: Ledger, shard: int) -> Any:
    commit = ledger.read_commit(shard)
    assert commit is not None
    return commit[0]


@pytest.mark.parametrize("how", ["larger", "smaller", "touched"])
def test_a_manifest_that_is_replaced_after_the_roll_up_is_read_again(ledger: Ledger, read: list[str], how: str) -> None:
    rolled_up(ledger)
    path = Path(ledger.storage.full(manifest_path(4)))
    if how == "touched":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
        commit(ledger, 4, rows_of(range(16, 20), id=["n" * (9 if how == "larger" else 1)] * 4))
    commits = known(ledger, "bbbbb")
    assert len(rows(commits)) == SHARDS * ROWS
    expected = [] if how == "touched" else [(16 + n, 4, "ok") for n in range(4)]
    assert set(expected) <= set(rows(commits))
    assert (commits.by_shard[4].failed is None) == (how != "touched")
    commits.roll_up_rest()
    read.clear()
    third = known(ledger, "ccccc")
    assert read == [], "the newer roll-up has it, whatever the older one says"
    assert rows(third) == rows(commits)


def test_a_manifest_that_is_removed_after_the_roll_up_does_not_count(ledger: Ledger) -> None:
    commits = rolled_up(ledger)
    ledger.storage.remove(manifest_path(4))
    commits.refresh()
    for each in (commits, known(ledger, "bbbbb")):
        assert sorted(each.by_shard) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert {shard for _, shard, _ in rows(each)} == set(each.by_shard)


def test_a_manifest_that_takes_the_place_of_ones_own_is_read(ledger: Ledger) -> None:
    commits = known(ledger)
    commit(ledger, 20, shard_rows(20))
    info, data = info_of(ledger, 20), ledger.storage.get(manifest_path(20))
    ledger.storage.remove(manifest_path(20))
    commit(ledger, 20, rows_of(range(80, 82)))
    commits.add(info, data or b"")
    commits.refresh()
    assert commits.by_shard[20].info.rows == 2
    commits.roll_up_rest()
    assert sorted(row for row, shard, _ in rows(known(ledger, "bbbbb")) if shard == 20) == [80, 81]


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_an_index_that_can_not_be_read_is_passed_over(
    ledger: Ledger, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    whole = rows(rolled_up(ledger))
    name = index_path("aaaaa000002")
    data = ledger.storage.get(name) or b""
    ledger.storage.put(name, data[: len(data) // 2] if damage is None else damage)
    assert rows(known(ledger, "bbbbb")) == whole
    assert f"{name} is passed over" in caplog.text


def test_the_index_of_an_older_version_says_nothing_of_joules(ledger: Ledger, read: list[str]) -> None:
    whole = rows(rolled_up(ledger))
    for name in ledger.storage.names("rollup"):
        if name.endswith("index.parquet"):
            table = pq.read_table(io.BytesIO(ledger.storage.get(f"rollup/{name}") or b""))
            data = io.BytesIO()
            pq.write_table(table.drop_columns(["sum_energy_j", "sum_energy_images"]), data)
            ledger.storage.put(f"rollup/{name}", data.getvalue())
    read.clear()
    later = known(ledger, "bbbbb")
    assert read == [], "it counts all the same"
    assert rows(later) == whole
    assert {commit.info.sums.describe()["energy_j"] for commit in later.by_shard.values()} == {None}


def test_rows_that_are_gone_or_fewer_are_no_result(ledger: Ledger) -> None:
    rolled_up(ledger)
    path = rows_path("aaaaa000002")
    table = pq.read_table(pa.BufferReader(ledger.storage.get(path) or b""))
    pq.write_table(table.slice(1), ledger.storage.full(path))
    for latest in ({}, {0: 0}):
        with pytest.raises(StorageError, match="has 11 rows, and the manifests 12; remove the directory rollup"):
            join_manifests(known(ledger, "bbbbb"), latest)
    ledger.storage.remove(path)
    with pytest.raises(StorageError, match="is not there any more; remove the directory rollup"):
        join_manifests(known(ledger, "bbbbb"), {})
    ledger.storage.remove(ROLLUPS)
    assert join_manifests(known(ledger, "bbbbb"), {}) == (30, 10)


def test_a_roll_up_of_another_run_does_not_count(ledger: Ledger) -> None:
    rolled_up(ledger)
    other = Ledger(ledger.storage, Unfenced())
    other._info = RUN_OF_ANOTHER_ID
    assert known(other, "bbbbb").by_shard == {}


class _Run:
    run_id = "another"


RUN_OF_ANOTHER_ID: Any = _Run()


def test_a_roll_up_that_can_not_be_written_does_not_end_the_run(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put = Ledger.put

    def refuse(self: Ledger, name: str, data: bytes) -> None:
        if name.startswith(ROLLUPS):
            raise StorageError("full")
        put(self, name, data)

    monkeypatch.setattr(Ledger, "put", refuse)
    commits = known(ledger)
    assert len(rows(commits)) == SHARDS * ROWS
    assert "the manifests of the last shards are not rolled up: full" in caplog.text
    monkeypatch.undo()
    assert join_manifests(commits, {}) == (30, 10)


def test_memory_does_not_grow_with_a_run_that_can_not_write_roll_ups(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits_module, "HELD_SHARDS", 6)
    commits = known(ledger)
    monkeypatch.setattr(Ledger, "put", lambda *_: (_ for _ in ()).throw(StorageError("full")))
    for shard in range(SHARDS, SHARDS + 40):
        commit(ledger, shard, shard_rows(shard))
        commits.add(info_of(ledger, shard), ledger.storage.get(manifest_path(shard)) or b"")
        commits._wait()
        assert sum(held.table is not None for held in commits._held.values()) <= 6
    for each in (commits, known(ledger, "bbbbb")):
        each.refresh()
        assert len(each.by_shard) == SHARDS + 40, "what is committed is known all the same"
        assert len(rows(each)) == (SHARDS + 40) * ROWS


def test_a_mark_that_looks_like_an_md5_and_is_none_costs_a_read(
    ledger: Ledger, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ETags of objects that S3 encrypts by a key of the user's."""
    monkeypatch.setattr(
        "gaudi_batch.storage.reading.entry_of_file", lambda stat: Entry(stat.st_size, 'ETag "' + "a" * 32)
    )
    commits = rolled_up(ledger)
    for shard in range(SHARDS, SHARDS + 3):
        commit(ledger, shard, shard_rows(shard))
        commits.add(info_of(ledger, shard), ledger.storage.get(manifest_path(shard)) or b"")
    commits._wait()
    assert len(commits.parts) == 5
    read.clear()
    assert len(known(ledger, "bbbbb").by_shard) == SHARDS + 3
    assert read == []


def test_a_listing_leaves_out_what_is_being_written(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = Path(ledger.storage.full("manifest"))
    (manifests / ".000003.parquet.part-0a").write_bytes(b"half")
    (manifests / "000099.parquet").symlink_to("nowhere")
    assert sorted(ledger.manifest_entries()) == list(range(SHARDS))


def test_a_directory_that_is_written_again_is_not_taken_for_a_complete_runs(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joined, "SORTED_BYTES", 100)
    join_manifests(known(ledger), {})
    ledger.storage.put("summary.json", b'{"state": "complete"}')
    put = Ledger.put

    def die(self: Ledger, name: str, data: bytes) -> None:
        if name.startswith(JOINED):
            raise KeyboardInterrupt
        put(self, name, data)

    monkeypatch.setattr(Ledger, "put", die)
    with pytest.raises(KeyboardInterrupt):
        join_manifests(known(ledger, "bbbbb"), {})
    assert ledger.storage.get("summary.json") is None


def joined_rows(place: str) -> list[tuple[Any, ...]]:
    table = pq.read_table(place).sort_by([("row", "ascending"), ("image_index", "ascending")])
    return list(zip(*table.to_pydict().values(), strict=True))


@pytest.fixture(params=[{}, {8: 11, 9: 11}], ids=["plain", "rows made again"])
def latest(request: pytest.FixtureRequest, ledger: Ledger) -> dict[int, int]:
    """Without and with a shard that makes rows again."""
    if request.param:
        commit(ledger, 11, rows_of([8, 9]), again=True)
    return dict(request.param)


def test_a_large_run_has_a_directory_of_the_same_rows(
    ledger: Ledger, latest: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ledger.storage.full(JOINED)
    counts = join_manifests(known(ledger), latest)
    as_file = joined_rows(place)
    assert len(as_file) == sum(counts) == SHARDS * ROWS, "each row once"
    monkeypatch.setattr(joined, "SORTED_BYTES", 100)
    for driver in ("bbbbb", "ccccc"):  # and once more, where it is a directory already
        Path(place if Path(place).is_file() else f"{place}/left-over.parquet").write_bytes(b"of another time")
        assert join_manifests(known(ledger, driver), latest) == counts
        assert joined_rows(place) == as_file
        assert ds.dataset(place).count_rows() == len(as_file)
    result = RunResult(ledger.storage.place, {"failed_rows": 10}, {})
    assert len(result.manifest()) == len(as_file)
    assert len(list(result.failed_rows())) == counts[1]
    monkeypatch.undo()
    assert join_manifests(known(ledger, "ddddd"), latest) == counts
    assert Path(place).is_file()
    assert joined_rows(place) == as_file


def test_overwriting_removes_the_roll_ups(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "SORTED_BYTES", 100)
    join_manifests(known(ledger), {})
    clear(ledger)
    assert left(ledger) == set()
    ledger.storage.put("log/aaaaa-000001.log", b"a line")
    for name in ("rollup/sales.csv", "timeline/2025/plan.md", "rollup/mine.parquet", "log/app.log"):
        ledger.storage.put(name, b"somebody's own")
    rolled_up(filled(ledger))
    clear(ledger)
    assert left(ledger) == {"rollup/sales.csv", "timeline/2025/plan.md", "rollup/mine.parquet", "log/app.log"}


def test_roll_ups_that_say_nothing_of_the_run_are_removed(ledger: Ledger) -> None:
    """One without an index, since its driver was killed, and one whose manifests have been put again."""
    commits = rolled_up(ledger)
    rows_only, stale = "rollup/zzzzz000001.parquet", "rollup/yyyyy000001"
    ledger.storage.put(rows_only, b"rows")
    for suffix in (".parquet", ".index.parquet"):
        ledger.storage.put(f"{stale}{suffix}", b"torn")
    for name in ("rollup/sales.csv", "rollup/daily20260101.parquet"):
        ledger.storage.put(name, b"somebody's own")
    before = rows(commits)
    used = left(ledger) - {rows_only, f"{stale}.parquet", f"{stale}.index.parquet"}
    commits.remove_unused(["aaaaa", "yyyyy", "zzzzz"])
    assert left(ledger) == used
    assert any(name.startswith("rollup/aaaaa") for name in used)
    assert rows(commits) == before


def left(ledger: Ledger) -> set[str]:
    place = Path(ledger.storage.place)
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def on_s3(moto: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Ledger]]:
    monkeypatch.setattr(commits_module, "ROLLUP_SHARDS", 3)
    url = moto.url("rolled")
    yield lambda: Ledger(Storage(url, moto.options), Unfenced())
    Storage(url, moto.options).remove("")


def test_a_store_s_own_marks_tell_what_was_replaced(on_s3: Callable[[], Ledger], read: list[str]) -> None:
    ledger = filled(on_s3())
    commits = known(ledger)
    commit(ledger, 20, shard_rows(20))
    read.clear()
    data = ledger.storage.get(manifest_path(20)) or b""
    commits.add(info_of(ledger, 20), data)
    read.clear()
    commits.refresh()
    assert read == [], "an ETag shows that it has the bytes that were put"
    commits.roll_up_rest()
    ledger.storage.remove(manifest_path(4))
    commit(ledger, 4, rows_of(range(16, 20)))
    read.clear()
    second = known(on_s3(), "bbbbb")
    assert read == [manifest_path(4)]
    assert second.by_shard[4].failed is None
    assert len(rows(second)) == (SHARDS + 1) * ROWS


def test_a_hundred_thousand_rows_that_were_made_again_count_once() -> None:
    """Each in a shard of its own; one condition for each would fill the stack."""
    again = 100_000
    rows = [*range(2 * again), *range(again), *range(5)]
    shards = [*[0] * (2 * again), *range(1, again + 1), *range(again + 1, again + 6)]
    latest = dict(zip(rows[2 * again :], shards[2 * again :], strict=True))
    table = pa.table({"row": rows, "shard": shards})
    counted = ds.dataset(table).filter(counting(latest)).to_table()
    assert counted.equals(keep_latest(table, latest))
    assert counted.num_rows == 2 * again
