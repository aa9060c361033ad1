"""What is written down of a run is read back as it was, and in an order that a crash can't harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Unfenced
from records import BUCKET

from gaudi_batch.errors import InputError
from gaudi_batch.output.cleanup import clear
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.run_info import RunInfo
from gaudi_batch.plan import Shard
from gaudi_batch.storage.store import Storage

INFO = RunInfo({"device": "cpu"}, {}, {}, "now", rows=8, images=8, run_id="run", stacks=[])
PLAN = [Shard(number, 0, 4 * number, 4 * number + 4, BUCKET, 4, 4) for number in range(3)]


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def test_a_run_is_read_back_as_it_was_begun(output: Storage) -> None:
    Ledger(output, Unfenced()).begin(INFO, PLAN[:2])
    reader = OutputReader(output)
    assert reader.run() == INFO
    assert reader.plan(INFO.rows) == PLAN[:2]
    assert reader.holds_run()
    assert reader.stack is None


def test_a_run_that_grows_has_its_new_shards_only_once_run_json_says_so(output: Storage) -> None:
    ledger = Ledger(output, Unfenced())
    ledger.begin(INFO, PLAN[:2])
    ledger.put_plan(PLAN)  # and here it is killed
    assert OutputReader(output).plan(INFO.rows) == PLAN[:2]
    grown = replace(INFO, rows=12, images=12)
    ledger.grow(grown, PLAN)
    assert OutputReader(output).run() == grown
    assert OutputReader(output).plan(grown.rows) == PLAN


@pytest.mark.parametrize("name", ["plan.parquet", "run.json"])
def test_each_object_that_is_torn_is_named_with_the_way_out(name: str, output: Storage) -> None:
    Ledger(output, Unfenced()).begin(INFO, PLAN)
    output.put(name, (output.get(name) or b"")[:20])
    reader = OutputReader(output)
    with pytest.raises(InputError, match=rf"{name} can't be read .*; --overwrite starts this output afresh"):
        reader.run() if name == "run.json" else reader.plan(8)


def test_what_a_run_did_not_write_stays_when_the_run_is_cleared(output: Storage) -> None:
    ledger = Ledger(output, Unfenced())
    ledger.begin(INFO, PLAN)
    for path in (
        "notes.txt",
        "images/mine.png",
        "images/000001-abcde1/00000000-00.png",
        "throughput/c/000001-abcde1.jsonl",
    ):
        output.put(path, b"x")
    clear(ledger)
    assert output.names("images") == ["mine.png"]
    assert output.names("throughput/c") == []
    assert output.get("notes.txt") == b"x"
    assert not ledger.holds_run()
