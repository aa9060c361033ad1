"""`gaudi-batch prompts` makes a Parquet file of what prompts come as; what it can't read is named by its line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import StoreServer, called
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset import convert
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.dataset.tables import open_table
from gaudi_batch.errors import InputError
from gaudi_batch.storage.store import Storage

Convert = Callable[..., tuple[list[dict[str, Any]], list[str]]]


@pytest.fixture
def converted(tmp_path: Path) -> Convert:
    """Converts a file; returns its rows and the lines that are left out."""

    def call(name: str, data: bytes, kind: str | None = None, **columns: str) -> tuple[list[dict[str, Any]], list[str]]:
        (tmp_path / name).write_bytes(data)
        storage = Storage(str(tmp_path))
        result = convert.convert(open_table(storage, name, kind), storage, "out.parquet", columns)
        rows: list[dict[str, Any]] = pq.read_table(tmp_path / "out.parquet").to_pylist()
        assert len(rows) == result.rows
        return rows, result.examples

    return call


CSV = b'\xef\xbb\xbfcaption,seed,scale,topic\r\n"a, ""b""",1,7.5,x\r\n"two\nlines",,2,\r\n'


def test_a_csv_file_has_its_columns_mapped_and_their_types(converted: Convert, tmp_path: Path) -> None:
    rows, bad = converted("p.csv", CSV, prompt="caption", guidance_scale="scale")
    assert rows == [
        {"prompt": 'a, "b"', "seed": 1, "guidance_scale": 7.5, "topic": "x"},
        {"prompt": "two\nlines", "seed": None, "guidance_scale": 2.0, "topic": None},
    ]
    assert not bad
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.types == [pa.string(), pa.int64(), pa.float64(), pa.string()]


def test_a_broken_line_is_named_and_costs_no_other(converted: Convert) -> None:
    lines = [
        "prompt,seed",
        "a,1",
        "b,x",
        "c,3,3",
        ",4",
        '"d,5',
        '"broken" quote,7',
        "e,8",
        "\udcff,9",
        "f,9.0",
        "g,1.5",
    ]
    rows, bad = converted("p.csv", "\n".join(lines).encode("utf-8", "surrogateescape"))
    assert [(row["prompt"], row["seed"]) for row in rows] == [("a", 1), ("e", 8), ("f", 9)]
    assert bad == [
        "line 3: seed is 'x'; it must be a whole number",
        "line 4: it has 3 fields, and the header 2",
        "line 5: prompt is empty",
        "line 6: a quote is not closed",
        "line 7: not CSV: ',' expected after '\"'",
        "line 9: prompt is not UTF-8",
        "line 11: seed is '1.5'; it must be a whole number",
    ]


def test_a_quote_that_is_not_closed_does_not_take_the_rest_of_a_large_file(converted: Convert) -> None:
    lines = ["prompt", '"never closed', *(f"prompt {number}" for number in range(20_000))]
    rows, bad = converted("p.csv", "\n".join(lines).encode())
    assert (len(rows), bad) == (20_000, ["line 2: a quote is not closed"])


def test_tsv_has_quotes_as_others_write_them_or_as_text(converted: Convert) -> None:
    data = b'prompt\tnote\n"G I G G L E" painted\tx\n"quoted ""so"""\ty\n"open\tz\n'
    rows, bad = converted("p.tsv", data)
    assert [row["prompt"] for row in rows] == ['"G I G G L E" painted', 'quoted "so"', '"open']
    assert not bad


def test_json_lines_keep_types_and_what_is_nested_or_mixed_as_json(converted: Convert) -> None:
    lines: list[Any] = [
        {"prompt": "a", "n": 1, "x": 1, "flag": True, "mixed": 1},
        {"prompt": "b", "n": 2.5, "nested": {"k": [1]}, "mixed": "text", "large": 2**70},
        {"prompt": 3},
        ["no object"],
        {"prompt": "c \ud800"},
        {"prompt": "d", "\ud800": 1},
        {"prompt": "e", "width": 1e400},
    ]
    rows, bad = converted("p.jsonl", "\n\n".join(map(json.dumps, lines)).encode() + b"\nnope\n")
    first = {"prompt": "a", "n": 1.0, "x": 1, "flag": True, "mixed": "1"}
    second = {"prompt": "b", "n": 2.5, "nested": '{"k": [1]}', "mixed": "text", "large": str(2**70)}
    empty = dict.fromkeys(["x", "flag", "nested", "large", "width"])
    assert rows == [empty | first, empty | second]
    assert [line.partition(":")[0] for line in bad] == ["line 5", "line 7", "line 9", "line 11", "line 13", "line 14"]
    assert bad[0] == "line 5: prompt is 3; it must be a text"


def test_text_is_a_prompt_a_line(converted: Convert) -> None:
    assert converted("p.txt", b"one\n\n two \r\n\xff\n") == (
        [{"prompt": "one"}, {"prompt": " two "}],
        ["line 4: prompt is not UTF-8"],
    )


def test_another_parquet_file_keeps_its_types(converted: Convert, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "", "b"], "tags": [["x"], None, []], "width": pa.array(["64", "64", "no"])})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=1)
    rows, bad = converted("in.parquet", (tmp_path / "in.parquet").read_bytes(), prompt="text")
    assert rows == [{"prompt": "a", "tags": ["x"], "width": 64}]
    assert bad == ["row 2: prompt is empty", "row 3: width is 'no'; it must be a whole number"]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files_are_read_and_torn_ones_refused(
    converted: Convert, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    data = compress(b"prompt\n" + b"".join(b"prompt %d\n" % number for number in range(5000)))
    assert len(converted(f"p.csv.{suffix}", data)[0]) == 5000
    with pytest.raises(InputError, match="can't be decompressed"):
        converted(f"p.csv.{suffix}", data[:-100])


@pytest.mark.parametrize(
    ("name", "data", "columns", "told"),
    [
        ("p.csv", b"", {}, "is empty; its first line must name the columns"),
        ("p.csv", b"prompt\n", {}, "has no row with a prompt"),
        ("p.csv", b"prompt\n \n", {}, "the first of 1 bad ones is line 2: prompt is empty"),
        ("p.csv", b"caption\na\n", {}, "no column 'prompt'; it has 'caption': name the right one with --columns"),
        ("p.csv", b"prompt\na\n", {"prompt": "caption"}, "has no column 'caption'; it has 'prompt'"),
        ("p.csv", b"prompt,id\na,1\n", {"prompt": "id"}, "has a column 'prompt' of its own, too"),
        ("p.csv", b"prompt,prompt\na,1\n", {}, "has the column 'prompt' more than once"),
        ("p.csv", b"prompt\na\n", {"prmpt": "prompt"}, "'prmpt' is no column that a job knows; did you mean 'prompt'?"),
        ("p.csv", b"\xff,prompt\na,b\n", {}, "the header in line 1 can't be read: not UTF-8"),
        ("p.parquet", b"PAR1", {}, "is not a readable Parquet file"),
        ("p.doc", b"x", {}, "ends with none of .csv, .tsv, .jsonl"),
    ],
)
def test_what_has_no_prompts_is_refused_by_name(
    converted: Convert, name: str, data: bytes, columns: dict[str, str], told: str
) -> None:
    with pytest.raises(InputError) as refused:
        converted(name, data, **columns)
    assert told in str(refused.value)


@given(texts=st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1))
def test_any_text_comes_through_csv_as_it_was(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    import csv
    import io

    directory = tmp_path_factory.mktemp("texts")
    texts = [text.replace("\r", " ").replace("\0", " ") for text in texts]
    texts = [text for text in texts if text.strip()] or ["a"]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([["prompt"], *([each] for each in texts)])
    (directory / "p.csv").write_bytes(text.getvalue().encode())
    storage = Storage(str(directory))
    convert.convert(open_table(storage, "p.csv"), storage, "out.parquet", {})
    assert pq.read_table(directory / "out.parquet")["prompt"].to_pylist() == texts


def test_row_groups_are_as_large_as_shards(converted: Convert, tmp_path: Path) -> None:
    converted("p.txt", b"".join(b"prompt %d\n" % number for number in range(2500)))
    metadata = pq.ParquetFile(tmp_path / "out.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(3)] == [1024, 1024, 452]
    job = JobConfig(prompts=str(tmp_path / "out.parquet"), output=str(tmp_path / "run"), device="simulated")
    assert open_prompts(job).rows == 2500


def test_the_command_says_what_it_made_and_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("caption,seed\na,1\nb,x\n")
    made = called("prompts", "p.csv", "p.parquet", "--columns.prompt", "caption")
    assert (made.returncode, made.stdout) == (
        3,
        "1 row with the columns prompt (string), seed (int64)\n"
        "left out: 1 line, the first of them:\n  line 3: seed is 'x'; it must be a whole number\n",
    )
    again = called("prompts", "p.csv", "p.parquet", "--columns", "prompt=caption")
    assert (again.returncode, "--overwrite replaces it" in again.stderr) == (2, True)
    assert called("prompts", "p.csv", "p.parquet", "--columns", "prompt=caption", "--overwrite").returncode == 3
    assert "must end with .parquet" in called("prompts", "p.csv", "p.out").stderr
    assert "there is no such file" in called("prompts", "q.csv", "q.parquet").stderr


def test_prompts_come_from_a_store_and_go_to_one(tmp_path: Path, s3: StoreServer) -> None:
    url = s3.url(tmp_path.name)
    Storage(url, s3.options).put("p.txt.gz", gzip.compress(b"one\ntwo\n"))
    options = json.dumps(s3.options)
    result = called("prompts", f"{url}/p.txt.gz", f"{url}/p.parquet", "--storage-options", options)
    assert result.returncode == 0, result.stderr
    job = JobConfig(prompts=f"{url}/p.parquet", output=f"{url}/out", storage_options=s3.options, device="simulated")
    assert open_prompts(job).rows == 2


@pytest.mark.parametrize("where", ["prompts.csv", "", "*.csv"])
def test_run_on_such_a_file_says_the_command(tmp_path: Path, where: str) -> None:
    (tmp_path / "prompts.csv").write_text("prompt\na\n")
    job = JobConfig(prompts=f"{tmp_path}/{where}", output=str(tmp_path / "out"), device="simulated")
    with pytest.raises(InputError) as refused:
        open_prompts(job)
    command = str(refused.value).partition("`")[2].partition("`")[0]
    assert command == f"gaudi-batch prompts {tmp_path}/prompts.csv prompts.parquet"


def test_a_column_that_no_job_knows_costs_no_row_and_stays_what_it_is(converted: Convert, tmp_path: Path) -> None:
    """Also where Python can't hold its values."""
    times = pa.array([2**62 + 1, 1, None], pa.timestamp("ns"))
    table = pa.table({"prompt": ["a", "b", "c"], "time": times, "width": [64.0, float("inf"), None]})
    pq.write_table(table, tmp_path / "in.parquet")
    storage = Storage(str(tmp_path))
    result = convert.convert(open_table(storage, "in.parquet"), storage, "out.parquet", {})
    assert result.examples == ["row 2: width is inf; it must be a whole number"]
    made = pq.read_table(tmp_path / "out.parquet")
    assert made["time"].cast(pa.int64()).to_pylist() == [2**62 + 1, None]
    assert made.schema.field("time").type == pa.timestamp("ns")


def test_columns_of_csv_have_numbers_where_all_are_written_so(converted: Convert) -> None:
    data = b"prompt,score,zip,share,flag,note\n1,2,007,0.5,true,3\nb,-10,10,2,false,x\nc,,1,,,\n"
    assert converted("p.csv", data) == (
        [
            {"prompt": "1", "score": 2, "zip": "007", "share": 0.5, "flag": True, "note": "3"},
            {"prompt": "b", "score": -10, "zip": "10", "share": 2.0, "flag": False, "note": "x"},
            {"prompt": "c", "score": None, "zip": "1", "share": None, "flag": None, "note": None},
        ],
        [],
    )


@pytest.mark.parametrize("name", ["p.csv.gz", "p.csv.bz2", "p.csv.xz"])
def test_what_is_not_compressed_as_its_name_says_is_refused(converted: Convert, name: str) -> None:
    with pytest.raises(InputError, match="can't be decompressed"):
        converted(name, b"prompt\na\n")


def test_bytes_that_are_damaged_within_a_compressed_file_are_told(converted: Convert) -> None:
    data = bytearray(gzip.compress(b"prompt\n" + b"".join(b"prompt %d\n" % number for number in range(5000))))
    data[200:300] = bytes(100)
    with pytest.raises(InputError, match="can't be decompressed"):
        converted("p.csv.gz", bytes(data))
