"""manifest.parquet: in order of row, with every column as it was, and read by pandas without losing a digit."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from column_types import ALIKE, ROWS, values
from helpers import REPOSITORY, Unfenced

from gaudi_batch.config.bounds import MAX_SEED, bounds_for
from gaudi_batch.dataset.repeats import RepeatedIds
from gaudi_batch.dataset.rows import PromptRow, RowRules, derived_seed, image_seed, make_row
from gaudi_batch.output import manifest
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.joined import JoinedManifest, join_manifests
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo, ImageInfo, StoredImage
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.plan import Bucket
from gaudi_batch.storage.store import Storage

RULES = RowRules(Bucket(64, 64, 20, 7.5), 1, None, 8, bounds_for(64, 64))
OUTPUTS = REPOSITORY / "docs/outputs.md"


def commit(ledger: Ledger, shard: int, rows: Sequence[PromptRow], again: bool = False) -> str:
    """Commits rows as a card records them; those with an error fail."""
    stored = StoredImage("images/x.png", "0" * 64, datetime.now(timezone.utc), 0.0, 0.0)
    images = {
        (row.row, image): ImageInfo(stored, image_seed(0, row, image), None, False)
        for row in rows
        if row.error is None
        for image in range(row.num_images)
    }
    failures = {row.row: row.error for row in rows if row.error is not None}
    info = CommitInfo(
        shard, "aaaaa0", "c", "n", None, len(rows), len(failures), len(images), ThroughputTotals(), again=again
    )
    carried = pa.table({"topic": pa.array([f"topic {row.row}" for row in rows])})
    assert ledger.commit(info, manifest.build(rows, carried, images, failures, 0, info))
    return info.attempt


def rows_of(numbers: Sequence[int], **columns: Sequence[Any]) -> list[PromptRow]:
    return [
        make_row(number, {"prompt": "p", **{name: column[place] for name, column in columns.items()}}, RULES)
        for place, number in enumerate(numbers)
    ]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Storage(str(tmp_path / "out")), Unfenced())


def known(ledger: Ledger) -> Commits:
    commits = Commits(ledger, "aaaaa")
    commits.refresh()
    return commits


def test_the_joined_manifest_is_in_order_of_row_and_image(ledger: Ledger, tmp_path: Path) -> None:
    commit(ledger, 0, rows_of([0, 2, 4], num_images=[2, 1, 1]))
    commit(ledger, 1, rows_of([1, 3, 5], seed=[None, -1, None]))
    commit(ledger, 2, rows_of([2]), again=True)
    assert join_manifests(known(ledger), {2: 2}) == (6, 1)
    table = pq.read_table(tmp_path / "out/manifest.parquet")
    assert table.column("row").to_pylist() == [0, 0, 1, 2, 3, 4, 5]
    assert table.column("image_index").to_pylist() == [0, 1, 0, 0, None, 0, 0]
    assert table.column("topic").to_pylist() == [f"topic {row}" for row in table.column("row").to_pylist()]


def test_columns_of_every_type_are_as_they_were_after_sorting(tmp_path: Path) -> None:
    columns = {name: column(0) for name, column in ALIKE.items()}
    table = pa.table({"row": range(ROWS), "image_index": [0] * ROWS, **columns})
    odd = list(range(1, ROWS, 2))
    with JoinedManifest(tmp_path / "manifest.parquet") as file:
        for places in (odd, [place - 1 for place in odd]):
            file.add(pa.concat_tables(table.slice(place, 1) for place in places))
    assert values(pq.read_table(tmp_path / "manifest.parquet")) == values(table)


def test_the_line_for_pandas_reads_every_number_as_it_is(ledger: Ledger, tmp_path: Path) -> None:
    seeds = [MAX_SEED, 4600196908893600043, None, 2**63]
    rows = rows_of(range(4), seed=seeds, width=[64, 64, 65, 64], prompt=["p", "", "p", "p"])
    commit(ledger, 0, rows)
    join_manifests(known(ledger), {})
    lines = re.findall(r"^images = (pandas.*)$", OUTPUTS.read_text(), re.MULTILINE)
    assert len(lines) == 1
    path = str(tmp_path / "out/manifest.parquet")
    expected = pq.read_table(path).select(["seed", "width", "height", "steps", "image_index"]).to_pydict()
    assert expected["seed"] == [MAX_SEED, 4600196908893600043, derived_seed(0, "2", 0), None]
    assert expected["width"] == [64, 64, None, 64]
    assert expected["steps"] == [20] * 4
    read = lines[0].replace('"manifest.parquet"', repr(path))
    assert read != lines[0]
    ended = subprocess.run(
        [sys.executable, "-c", READ_WITH_PANDAS.format(read=read, names=list(expected))],
        env=os.environ | {"PYTHONPATH": str(Path(sys.executable).parents[1] / "pandas")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == expected


# It ends past the interpreter's end, at which a thread of pyarrow may abort the process.
READ_WITH_PANDAS = """
import json, os, pandas
images = {read}
values = {{name: [None if pandas.isna(value) else value for value in images[name]] for name in {names}}}
assert {{type(value) for column in values.values() for value in column}} <= {{int, type(None)}}
print(json.dumps(values), flush=True)
os._exit(0)
"""


def test_ids_that_repeat_are_found_where_manifests_are_joined(ledger: Ledger) -> None:
    ids = ["a", "b", "a", "a", "c", "c"]
    rows = rows_of(range(6), id=ids, seed=[None, None, None, 7, None, None], num_images=[2] * 6)
    commit(ledger, 0, rows[:3])
    commit(ledger, 1, rows[3:])
    for may_have_seeds, message in ((True, "4 of 5 rows share an id"), (False, "5 of 6 rows share an id")):
        repeated = RepeatedIds()

        def seen(table: pa.Table, ids: RepeatedIds = repeated, seeds: bool = may_have_seeds) -> None:
            ids.add_manifest(table, 0, seeds)

        join_manifests(known(ledger), {}, seen)
        assert (repeated.describe() or "").startswith(message)


def test_a_failed_row_of_a_run_that_began_without_bounds_has_no_more_than_its_other_failed_rows() -> None:
    old = dataclasses.replace(RULES, bounds=None)
    row = make_row(1, {"prompt": None, "width": 65}, old)
    assert (row.has_seed, row.asked) == (False, {})
    assert make_row(1, {"prompt": None, "seed": 5}, old).has_seed


def test_when_the_last_image_was_stored_is_known_to_the_microsecond(ledger: Ledger) -> None:
    """By the driver's clock where the manifest has it, else by that of the card's node."""
    commit(ledger, 0, rows_of(range(3)))
    ((_, table),) = ledger.commits()
    moments = [moment.timestamp() for moment in table.column("finished_at").to_pylist()]
    assert manifest.finished_at(table, CommitInfo(0, "a", "c", "n", None, 3, 0, 3, ThroughputTotals())) == max(moments)
    own = CommitInfo(0, "a", "c", "n", None, 3, 0, 3, ThroughputTotals(), finished_at=12.5)
    assert manifest.finished_at(table, own) == 12.5
    assert manifest.finished_at(table.slice(0, 0), dataclasses.replace(own, finished_at=None)) is None


def test_a_manifest_with_a_number_that_can_t_be_is_none() -> None:
    for info, whole in (
        (CommitInfo(3, "a", "c", "n", None, MAX_SEED, 0, 0, ThroughputTotals()), True),
        (CommitInfo(3, "a", "c", "n", None, 2**63, 0, 0, ThroughputTotals()), False),
        (CommitInfo(3, "a", "c", "n", None, 0, 0, 0, ThroughputTotals(), finished_at=-1.0), False),
    ):
        data = manifest.build([], pa.table({}), {}, {}, 0, info)
        if whole:
            assert manifest.read(data)[1] == info
        else:
            with pytest.raises(ValueError, match="a number of its attempt can't be"):
                manifest.read(data)


def test_a_carried_column_that_is_named_like_one_of_ours_gets_a_name_of_its_own() -> None:
    carried = pa.schema([("seed", pa.int64()), ("input_seed", pa.string()), ("topic", pa.string())])
    assert manifest.schema(carried).names[len(manifest.COLUMNS) :] == ["input_input_seed", "input_seed", "topic"]


def test_a_file_with_more_or_fewer_rows_than_were_written_is_not_what_was_written(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": range(5)}), tmp_path / "p.parquet")
    manifest.require_readable(tmp_path / "p.parquet", 5)
    for rows in (4, 6):
        with pytest.raises(ValueError, match=f"has 5 rows, and {rows} were to be"):
            manifest.require_readable(tmp_path / "p.parquet", rows)
