"""What prompts carry comes back in manifest.parquet as it was, whatever its type and however many files it is in."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from column_types import ALIKE, ROWS, categories, values

from gaudi_batch import InputError, JobConfig, RunResult, StorageError, run
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.storage.store import Storage

pytestmark = pytest.mark.usefixtures("thread_cards")

UNLIKE: dict[str, tuple[Any, pa.DataType, pa.DataType]] = {
    "integers": (7, pa.int8(), pa.int16()),
    "decimals": (Decimal("7.25"), pa.decimal128(5, 2), pa.decimal128(12, 4)),
    "strings": ("a", pa.string(), pa.large_string()),
    "dictionaries": ("a", pa.dictionary(pa.int8(), pa.string()), pa.string()),
    "times": (datetime.datetime(2026, 1, 1), pa.timestamp("ms"), pa.timestamp("ns")),
    "nothing_yet": (None, pa.null(), pa.string()),
    "lists": ([7], pa.list_(pa.int8()), pa.large_list(pa.int64())),
}
"""Columns that are of two types."""


def make(prompts: Path, output: Path, cluster: str, **fields: Any) -> RunResult:
    simulated: dict[str, Any] = {"device": "simulated", "simulated": {"batch_seconds": 0.0}}
    fields = simulated | {"shard_size": 48, "cards": 1, "carry": ["*"]} | fields
    return run(JobConfig(prompts=str(prompts), output=str(output), **fields), address=cluster)


def test_columns_of_every_type_come_back_as_they_were(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    files = [
        pa.table(
            {"prompt": ["p"] * ROWS}
            | {name: column(file) for name, column in ALIKE.items()}
            | {name: pa.array([value] * ROWS, types[file]) for name, (value, *types) in UNLIKE.items()}
        )
        for file in (0, 1)
    ]
    prompts = write_prompts(*files, row_group_size=40)
    expected: dict[str, list[Any]] = {}
    for name in files[0].column_names:
        expected[name] = [value for file in files for value in values(file.select([name]))[name]]
    for name in ("decimals", "times"):  # these show their type
        expected[name] = expected[name][ROWS:] * 2

    make(prompts, tmp_path / "out", cluster)
    table = pq.read_table(tmp_path / "out/manifest.parquet").sort_by("row")
    assert set(table.column("error").to_pylist()) == {None}
    stored = values(table.select(files[0].column_names))
    assert [name for name in expected if stored[name] != expected[name]] == []


def as_older_code_wrote_it(manifest: Path) -> None:
    """With the dictionary that the prompts have."""
    table = pq.read_table(manifest)
    column = table.column("dictionary").cast(pa.dictionary(pa.int8(), pa.string()))
    pq.write_table(table.set_column(table.schema.get_field_index("dictionary"), "dictionary", column), manifest)


def test_a_run_whose_first_manifests_have_dictionaries_is_finished(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    output = tmp_path / "out"
    prompts = write_prompts(*({"prompt": ["p"] * ROWS, "dictionary": categories(file)} for file in (0, 1)))
    make(prompts, output, cluster)
    whole = pq.read_table(output / "manifest.parquet")
    for path in sorted((output / "manifest").iterdir())[:-1]:
        as_older_code_wrote_it(path)
    make(prompts, output, cluster)
    assert pq.read_table(output / "manifest.parquet").equals(whole)


def test_a_run_is_complete_only_when_its_joined_manifest_can_be_read(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    prompts = write_prompts(*({"prompt": ["p"] * ROWS, "dictionary": categories(file)} for file in (0, 1)))
    make(prompts, output, cluster)
    (output / "summary.json").unlink()
    for path in (output / "manifest").iterdir():
        as_older_code_wrote_it(path)
    monkeypatch.setattr("gaudi_batch.output.joined.plain", lambda schema: schema)
    with pytest.raises(StorageError, match="can't be read back"):
        make(prompts, output, cluster)
    assert not (output / "summary.json").exists()


def test_large_columns_are_joined_a_part_at_a_time(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gaudi_batch.output.joined.GROUP_BYTES", 1 << 20)
    prompts = write_prompts({"prompt": ["p"] * ROWS, "large": [str(number) * 20_000 for number in range(ROWS)]})
    make(prompts, tmp_path / "out", cluster, shard_size=8)
    with pq.ParquetFile(tmp_path / "out/manifest.parquet") as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        assert len(groups) > 1
        column = file.read().sort_by("row").column("large").to_pylist()
    assert [value == str(number) * 20_000 for number, value in enumerate(column)] == [True] * ROWS


def test_a_file_without_a_column_of_required_parts_costs_no_row(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    prompts = write_prompts({"prompt": ["p"] * ROWS, "required": ALIKE["required"](0)}, {"prompt": ["q"]})
    make(prompts, tmp_path / "out", cluster)
    table = pq.read_table(tmp_path / "out/manifest.parquet").sort_by("row")
    assert table.column("required").to_pylist() == [{"a": 1}] * ROWS + [None]


def test_a_value_that_the_shared_type_can_not_hold_is_null_and_no_other_value(
    write_prompts: Callable[..., Path], tmp_path: Path, cluster: str
) -> None:
    last, first = datetime.datetime(9999, 12, 31), datetime.datetime(2026, 1, 1)
    prompts = write_prompts(
        {"prompt": ["p", "q"], "until": pa.array([last, first], pa.timestamp("us")), "n": pa.array([-1, 1], pa.int8())},
        {"prompt": ["r"], "until": pa.array([0], pa.timestamp("ns")), "n": pa.array([2**63 + 1], pa.uint64())},
    )
    make(prompts, tmp_path / "out", cluster)
    table = pq.read_table(tmp_path / "out/manifest.parquet").sort_by("row")
    assert table.column("until").is_null().to_pylist() == [True, False, False]
    assert table.column("n").to_pylist() == [-1, 1, None]


def test_columns_that_no_type_can_hold_are_refused_by_name(write_prompts: Callable[..., Path]) -> None:
    prompts = write_prompts(
        {"prompt": ["p"], "price": pa.array([1], pa.int16())},
        {"prompt": ["q"], "price": pa.array([Decimal("1.50")], pa.decimal128(5, 2))},
    )
    with pytest.raises(InputError, match=r"'part-0.parquet': column 'price' is int16"):
        open_prompts(JobConfig(prompts=str(prompts), output="out", device="simulated"))


def test_a_run_is_complete_only_when_its_joined_manifest_is_whole_in_storage(
    prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    make(prompts, output, cluster)
    (output / "summary.json").unlink()
    put = Storage.put_file

    def put_and_tear(self: Storage, path: str, *others: Any) -> None:
        put(self, path, *others)
        os.truncate(self.full(path), 100)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "put_file", put_and_tear)
        with pytest.raises(StorageError, match=r"manifest.parquet has 100 bytes"):
            make(prompts, output, cluster)
    assert not (output / "summary.json").exists()
    assert make(prompts, output, cluster).exit_code == 0
