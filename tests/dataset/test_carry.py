"""Which columns of the prompts the manifests carry, and that a card decodes no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prompts import RULES, opened

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.discovery import NESTED_BYTES, open_prompts
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.dataset.scan import batches
from gaudi_batch.errors import InputError
from gaudi_batch.job import Fixed, resolve
from gaudi_batch.plan import Shard

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
ROWS = 50
SHARD = Shard(0, 0, 0, ROWS, RULES.bucket, ROWS, ROWS)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Rows with columns of many kinds beside the prompt."""
    table = {
        "prompt": [f"prompt {row}" for row in range(ROWS)],
        "topic": ["t"] * ROWS,
        "tags": [["a", "b"]] * ROWS,
        "point": pa.array([{"x": 1, "y": 2}] * ROWS),
        "embedding": pa.array([[float(row)] * NESTED_BYTES for row in range(ROWS)]),
        "thumbnail": [bytes([row]) * 5000 for row in range(ROWS)],
        "image": pa.array([{"bytes": b"x", "path": "p"}] * ROWS, IMAGE),
        "key": pa.array([b"0123"] * ROWS, pa.binary(4)),
    }
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table(table), path, use_dictionary=False, compression="none")
    return path


def carried(dataset: PromptDataset) -> list[str]:
    rows, table = dataset.read(SHARD, RULES)
    assert len(rows) == ROWS
    assert len(table) == ROWS or not table.column_names
    return list(table.column_names)


def test_binary_and_large_nested_columns_are_left_out_and_named(
    prompts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "gaudi_batch"):
        assert carried(opened(prompts)) == ["topic", "tags", "point"]
    assert (
        "do not carry 'embedding', 'thumbnail', 'image', 'key', as binary or as nested and over 256 bytes"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("carry", "columns"),
    [
        ("image,topic", ["topic", "image"]),
        (["embedding"], ["embedding"]),
        ("*", ["topic", "tags", "point", "embedding", "thumbnail", "image", "key"]),
        ([], []),
        ("", []),
        ("prompt", []),  # manifests have it anyway
    ],
)
def test_a_job_names_what_is_carried(prompts: Path, carry: Any, columns: list[str]) -> None:
    assert carried(opened(prompts, carry=carry)) == columns


def test_a_column_that_is_not_there_is_refused(prompts: Path) -> None:
    with pytest.raises(InputError, match="carry: the prompts have no column 'topics'; they have 'prompt', 'topic'"):
        opened(prompts, carry="topics")


def spoil_thumbnails(prompts: Path) -> None:
    """Makes one column unreadable."""
    chunk = (
        pq.ParquetFile(prompts)
        .metadata.row_group(0)
        .column(next(i for i in range(20) if pq.ParquetFile(prompts).schema.column(i).path == "thumbnail"))
    )
    data = bytearray(prompts.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    prompts.write_bytes(data)


def test_a_card_decodes_no_column_that_it_does_not_need(prompts: Path) -> None:
    spoil_thumbnails(prompts)
    assert carried(opened(prompts)) == ["topic", "tags", "point"]
    every = opened(prompts, carry="*")
    rows, _ = every.read(SHARD, RULES)
    assert all("can't be decoded" in (row.error or "") for row in rows)


def test_a_run_carries_the_columns_that_it_began_with(prompts: Path, write_prompts: Callable[..., Path]) -> None:
    config = JobConfig(prompts=str(prompts), output="out", device="simulated")
    began = resolve(config)
    assert began.fingerprint()["carry"] == ["topic", "tags", "point"]
    older = resolve(config, Fixed(None, None, None, ("*",), False))
    assert "carry" not in older.fingerprint()
    assert older.dataset.carried.names == open_prompts(config.model_copy(update={"carry": ["*"]})).carried.names
    same = resolve(config, Fixed(None, None, None, ("topic", "tags", "point"), False))
    assert same.fingerprint()["carry"] == began.fingerprint()["carry"]
    other = resolve(config.model_copy(update={"carry": ["topic"]}), Fixed(None, None, None, ("*",), False))
    assert other.fingerprint()["carry"] == ["topic"]
    plain = write_prompts({"prompt": ["a"], "topic": ["t"]}, name="plain")
    assert "carry" not in resolve(JobConfig(prompts=str(plain), output="out", device="simulated")).fingerprint()


def test_a_strict_check_of_all_rows_decodes_no_other_column_either(prompts: Path) -> None:
    spoil_thumbnails(prompts)
    assert [batch.error for batch in batches(opened(prompts), every_column=True)] == [None]
    assert all(batch.error for batch in batches(opened(prompts, carry="*"), every_column=True))


def test_what_a_large_run_has_written_beside_its_manifests_is_no_prompt(prompts: Path) -> None:
    out = prompts.parent / "out"
    for name in (
        "rollup/aaaaa000001.parquet",
        "rollup/aaaaa000001.index.parquet",
        "manifest.parquet/aaaaa000001.parquet",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"prompt": ["a row of a manifest"]}), out / name)
    pq.write_table(pa.table({"prompt": ["one of mine"]}), out / "rollup/mine.parquet")
    (out / "run.json").write_text('{"fingerprint": {}}')
    assert [file.name for file in opened(prompts.parent).files] == ["out/rollup/mine.parquet", "prompts.parquet"]
