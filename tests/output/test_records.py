"""All records of a run are read as its driver knows them, from roll-ups or manifests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers import REPOSITORY, Unfenced
from test_joined import commit, rows_of

from gaudi_batch.layout import ROLLUPS
from gaudi_batch.output import commits as commits_module
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.records import read_records
from gaudi_batch.storage.store import Storage


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """Of a run of three shards, two of which a roll-up has; one row of each failed, and that of the first was made
    again and failed again."""
    monkeypatch.setattr(commits_module, "ROLLUP_SHARDS", 2)
    kept = REPOSITORY / "tests/data/half_done/simulated/output"
    for name in ("run.json", "plan.parquet"):
        (tmp_path / "out").mkdir(exist_ok=True)
        shutil.copy(kept / name, tmp_path / "out" / name)
    ledger = Ledger(Storage(str(tmp_path / "out")), Unfenced())
    for shard in range(3):
        commit(ledger, shard, rows_of(range(4 * shard, 4 * shard + 4), seed=[None, None, None, -1]))
    commit(ledger, 3, rows_of([3], seed=[-1]), again=True)
    return ledger


@pytest.mark.parametrize("rolled_up", [False, True])
def test_a_row_that_was_made_again_counts_once(
    rolled_up: bool, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rolled_up:
        commits = Commits(ledger, "bbbbb")
        commits.refresh()
        commits.roll_up_rest()
        assert ledger.storage.names(ROLLUPS)
    info = ledger.run()
    assert info is not None
    monkeypatch.setattr(ledger, "is_of_run", lambda info: True)
    records = read_records(ledger)
    assert [commit.info.shard for commit in records.commits] == [0, 1, 2, 3]
    assert records.latest_shard_of_row == {3: 3}
    assert sum(group["rows"] for group in records.failed().describe()) == 3
    assert sum(commit.info.images for commit in records.commits) == 9
