"""`gaudi-batch prompts` makes a Parquet file of what prompts come as; what it can't read is named by its line."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import shlex
from collections.abc import Callable
from decimal import Decimal
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

SEED = "must be a whole number in 0 .. 9223372036854775807"
WIDTH = "must be a whole number in 1 .. 2147483647"
GUIDANCE = "must be a number in 0 .. 1000"
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


@pytest.mark.parametrize(("name", "data"), [("p.csv", b"prompt, seed\na, 1\n"), ("p.tsv", b"prompt\t seed \na\t1\n")])
def test_spaces_around_the_names_of_a_header_do_not_count(converted: Convert, name: str, data: bytes) -> None:
    assert converted(name, data) == ([{"prompt": "a", "seed": 1}], [])


def test_a_name_that_could_not_be_seen_is_told_in_quotes(converted: Convert, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b",prompt\n0,a\n")
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt":"a"," seed":1}\n')
    storage = Storage(str(tmp_path))
    told = [
        convert.convert(open_table(storage, name), storage, "out.parquet", {}).lines()[0]
        for name in ("p.csv", "p.jsonl")
    ]
    assert told == [
        "1 row with the columns '' (int64), prompt (string)",
        "1 row with the columns prompt (string), ' seed' (int64)",
    ]


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
        f"line 3: seed is 'x'; it {SEED}",
        "line 4: it has 3 fields, and the header 2",
        "line 5: prompt is empty",
        "line 6: a quote is not closed",
        "line 7: not CSV: ',' expected after '\"'",
        "line 9: prompt is not UTF-8",
        f"line 11: seed is '1.5'; it {SEED}",
    ]


def test_a_quote_that_is_not_closed_does_not_take_the_rest_of_a_large_file(converted: Convert) -> None:
    lines = ["prompt", '"never closed', *(f"prompt {number}" for number in range(20_000))]
    rows, bad = converted("p.csv", "\n".join(lines).encode())
    assert (len(rows), bad) == (20_000, ["line 2: a quote is not closed"])


BROKEN = b"""id,prompt
1,a
2,"b, c"
6,"red circle
7,x
8,y
9,blue 5"
10,z
"""


def test_a_quote_that_a_later_line_closes_by_chance_costs_its_own_line(converted: Convert) -> None:
    """All lines that it would take have a number in the same column, and all their fields."""
    rows, bad = converted("p.csv", BROKEN)
    assert bad == [
        "line 4: lines 4 to 7 are taken for rows of their own, as each has all fields, and a number or nothing in"
        " the same column; close the quote in line 4, or give a row over several lines as JSON"
    ]
    assert [row["id"] for row in rows] == ["1", "2", "7", "8", "9", "10"]
    assert rows[-2]["prompt"] == 'blue 5"'


@pytest.mark.parametrize(
    "text",
    [
        'prompt, seed, tag\np 1, 1, x\n"a cat, 2, x\np 3, 3, x\na tv of 6", 6, x\np 7, 7, x\n',
        'prompt,seed,tag\np 1,1,x\n"a cat,+2,x\np 3,1e3,x\na tv of 6",6.,x\np 7,7,x\n',
        'prompt,seed,tag\np 1,1,x\n"a cat,2,x\np 3,,x\na tv of 6",6,x\np 7,7,x\n',
        'prompt,seed,tag\np 1,1,x\n"a cat,,x\np 3,3,x\na tv of 6",6,x\np 7,7,x\n',
        'prompt,seed,tag\np 1,1,x\n"a cat,,x\np 3,3,x\na tv of 6",,x\np 7,7,x\n',
        'prompt, seed, tag\np 1, 1, x\n"a cat, 2, x\np 3, , x\na tv of 6", 6, x\np 7, 7, x\n',
    ],
)
def test_rows_that_a_quote_would_take_may_have_their_numbers_as_any_row(converted: Convert, text: str) -> None:
    rows, bad = converted("p.csv", text.encode())
    assert [row["prompt"] for row in rows] == ["p 1", "p 3", 'a tv of 6"', "p 7"]
    assert [line.partition(" are taken")[0] for line in bad] == ["line 3: lines 3 to 5"]


@pytest.mark.parametrize(
    "text",
    [
        'prompt,seed\n"masterpiece,\nbest quality,\na cat",5\n',
        'prompt,seed\n"masterpiece, 8\n1girl, 8\na cat",5\n',
        'prompt,seed\n"masterpiece,\n1girl, 8\nbest,\na cat",5\n',
        'seed,prompt\n5,"masterpiece\n,best quality\n,a cat"\n',
    ],
)
def test_a_sound_row_whose_lines_have_commas_as_a_text_has_stays_whole(converted: Convert, text: str) -> None:
    rows, bad = converted("p.csv", text.encode())
    assert [row["seed"] for row in rows] == [5]
    assert not bad


def test_a_row_over_several_lines_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text('id,prompt\n1,a\n2,"High quality,\n\nof a cat, a dog"\n3,"b\nc",x\n')
    made = called("prompts", "p.csv", "p.parquet")
    assert made.stdout == (
        "2 rows with the columns id (string), prompt (string)\n"
        "left out: 2 lines, the first of them:\n"
        "  lines 6 to 7: it has 3 fields, and the header 2; a quote may not be closed\n"
        "over several lines, unless a quote is not closed: 1 row, the first of them:\n"
        "  lines 3 to 5 are one row: High quality, of a cat, a dog\n"
    )
    assert made.returncode == 3


def test_a_quote_of_tsv_takes_no_other_line(converted: Convert) -> None:
    data = b'id\tprompt\tnote\n1\t"Hello there\tx\n2\tshe said goodbye"\ty\n3\t"a\tb"\n4\t"c\td"\te\n'
    rows, bad = converted("p.tsv", data)
    assert [(row["id"], row["prompt"], row["note"]) for row in rows] == [
        ("1", '"Hello there', "x"),
        ("2", 'she said goodbye"', "y"),
        ("3", '"a', 'b"'),
        ("4", "c\td", "e"),
    ]
    assert not bad


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


@pytest.mark.parametrize("large", [9007199254740993, 90071992547409931, 2**63 - 1])
@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_a_whole_number_keeps_its_digits_beside_others(converted: Convert, name: str, large: int) -> None:
    csv = f"prompt,x,y\na,{large},{large}\nb,0.5,1\n"
    lines = f'{{"prompt":"a","x":{large},"y":{large}}}\n{{"prompt":"b","x":0.5,"y":1}}\n'
    rows, bad = converted(name, (csv if name == "p.csv" else lines).encode())
    assert [str(row["x"]) for row in rows] == [str(large), "0.5"]
    assert [int(row["y"]) for row in rows] == [large, 1]
    assert not bad


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("seed", "9223372036854775813", SEED),
        ("seed", "-1", SEED),
        ("seed", "1" * 5000, SEED),
        ("seed", "9007199254740993.0", None),
        ("width", "0", WIDTH),
        ("num_images", "2.5", "must be a whole number in 1 .. "),
        ("guidance_scale", "nan", GUIDANCE),
        ("guidance_scale", "inf", GUIDANCE),
        ("guidance_scale", "-5", GUIDANCE),
        ("guidance_scale", "1000.1", GUIDANCE),
        ("guidance_scale", "1_0", GUIDANCE),
        ("guidance_scale", "\u0663", GUIDANCE),
        ("steps", "1001", "must be a whole number in 1 .. 1000"),
        ("steps", "1_0", "must be a whole number in 1 .. "),
    ],
)
def test_a_number_that_no_job_takes_is_told_with_the_range(
    converted: Convert, name: str, value: str, rule: str | None
) -> None:
    rows, bad = converted("p.csv", f"prompt,{name}\na,{value}\nb,\n".encode())
    assert [row["prompt"] for row in rows] == (["b"] if rule else ["a", "b"])
    assert rule is None or rule in bad[0]
    assert rule is not None or rows[0][name] == 9007199254740993


def test_text_is_a_prompt_a_line(converted: Convert) -> None:
    assert converted("p.txt", b"one\n\n two \r\n\xff\n") == (
        [{"prompt": "one"}, {"prompt": " two "}],
        ["line 4: prompt is not UTF-8"],
    )


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.txt", "one\u2028two\x85\x0c\rthree\n\rfour\r\nfive"),
        ("p.csv", "prompt\rone\u2028two\x85\x0c\rthree\n\rfour\r\nfive"),
        ("p.tsv", "prompt\rone\u2028two\x85\x0c\rthree\n\rfour\r\nfive"),
        ("p.jsonl", '{"prompt": "one\u2028two\x85\\f"}\r{"prompt": "three"}\r{"prompt": "four"}\r\n{"prompt": "five"}'),
    ],
)
def test_lines_end_as_on_any_system_and_at_no_other_separator(converted: Convert, name: str, data: str) -> None:
    rows, bad = converted(name, data.encode())
    assert [row["prompt"] for row in rows] == ["one\u2028two\x85\x0c", "three", "four", "five"]
    assert not bad


def test_text_with_zero_characters_is_no_prompt(converted: Convert) -> None:
    assert converted("p.txt", b"a\0b\nc\n") == (
        [{"prompt": "c"}],
        ["line 1: it has a zero character; if the file is UTF-16, save it as UTF-8"],
    )
    with pytest.raises(InputError, match="the first of 3 bad ones is line 1: it has a zero character"):
        converted("p.txt", "one\ntwo\n".encode("utf-16-le"))


def test_another_parquet_file_keeps_its_types(converted: Convert, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "", "b"], "tags": [["x"], None, []], "width": pa.array(["64", "64", "no"])})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=1)
    rows, bad = converted("in.parquet", (tmp_path / "in.parquet").read_bytes(), prompt="text")
    assert rows == [{"prompt": "a", "tags": ["x"], "width": 64}]
    assert bad == ["row 2: prompt is empty", f"row 3: width is 'no'; it {WIDTH}"]


def test_ids_that_are_decimals_and_texts_that_are_binary_are_taken(converted: Convert, tmp_path: Path) -> None:
    """As DuckDB and Spark write them."""
    ids = pa.array([Decimal(1), Decimal(10**30), Decimal(3), None], pa.decimal128(38, 0))
    texts = pa.array(["a é".encode(), b"b", b"\xff", b"c"], pa.binary())
    table = pa.table({"id": ids, "prompt": texts, "negative_prompt": texts, "seed": [b"1", None, None, None]})
    pq.write_table(table, tmp_path / "in.parquet")
    data = (tmp_path / "in.parquet").read_bytes()
    rows, bad = converted("in.parquet", data)
    assert rows == [
        {"id": str(10**30), "prompt": "b", "negative_prompt": "b", "seed": None},
        {"id": None, "prompt": "c", "negative_prompt": "c", "seed": None},
    ]
    assert bad == [f"row 1: seed is b'1'; it {SEED}", "row 3: prompt is not UTF-8"]


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
        ("p.csv", b"prompt,seed, seed\na,1,2\n", {}, "has the column 'seed' more than once"),
        ("p.csv", b"prompt\na\n", {"prmpt": "prompt"}, "'prmpt' is no column that a job knows; did you mean 'prompt'?"),
        ("p.csv", b"\xff,prompt\na,b\n", {}, "the header in line 1 can't be read: not UTF-8; save the file as UTF-8"),
        ("p.csv", b"\nprompt\na\n", {}, "'p.csv': line 1 is empty; it must name the columns"),
        ("p.tsv", b"\xef\xbb\xbf\r\nprompt\na\n", {}, "'p.tsv': line 1 is empty; it must name the columns"),
        ("p.txt", "one\ntwo\n".encode("utf-16"), {}, "'p.txt' is text in UTF-16 or UTF-32; save it as UTF-8"),
        ("p.jsonl", b'\n{"prompt": "a",}\n' * 2, {}, "the first of 2 bad ones is line 2: not JSON: "),
        ("p.json", b'{"prompt": "a",}\n', {"prompt": "text"}, "the first of 1 bad ones is line 1: not JSON: "),
        ("p.jsonl", b'{\n  "prompt": "a"\n}\n', {}, "line 1: not JSON: it ends too early; an object must stand whole"),
        ("p.json", b'{\n  "prompt": "a"\n}\n', {}, "line 1: not JSON: it ends too early; an object must stand whole"),
        ("p.jsonl", b"[1]\n", {}, "the first of 1 bad ones is line 1: it is no JSON object"),
        ("p.jsonl", b"[" * 100_000, {}, "line 1: not JSON: it is nested too deeply"),
        ("p.json", b'[\n{"prompt": "a",,}]', {}, "'p.json' can't be read as a JSON array, no item of it: "),
        (
            "p.jsonl",
            b'{"n": %s}' % (b"1" * 5000),
            {},
            "line 1: a number has too many digits; in quotes it is kept as a",
        ),
        ("p.json", b'[{"n": %s}]' % (b"1" * 5000), {}, "no item of it: a number has too many digits; in quotes it is"),
        ("p.json", b"[1]", {}, "the first of 1 bad ones is item 1: it is no JSON object"),
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
    texts = [text.replace("\0", " ") for text in texts]
    texts = [text for text in texts if text.strip()] or ["a"]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([["prompt"], *([each] for each in texts)])
    (directory / "p.csv").write_bytes(text.getvalue().encode())
    storage = Storage(str(directory))
    convert.convert(open_table(storage, "p.csv"), storage, "out.parquet", {})
    assert pq.read_table(directory / "out.parquet")["prompt"].to_pylist() == texts


MARKS = [*'"{}[]:,\n\t\r\0', '""', "x,", '"prompt"', '"a"', '{"prompt":"a","x":', "prompt", "PAR1"]
VALUES = ["9007199254740993", "0.5", "1e999", "9" * 30, "null", "true", "\ufeff", "\udcff", "\\ud800", "é", "\u2028"]
ODD = st.sampled_from(MARKS + VALUES)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt", "parquet"])
@given(parts=st.lists(ODD), start=st.sampled_from(["", "prompt,x\n", "prompt\tx\n", '{"prompt":"a","x":1}\n', "["]))
def test_no_text_ends_in_anything_but_rows_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, kind: str, parts: list[str], start: str
) -> None:
    directory = tmp_path_factory.mktemp("odd")
    data = (start + "".join(parts)).encode("utf-8", "surrogateescape")
    storage = Storage(str(directory))
    for name, written in ((f"p.{kind}", data), (f"p.{kind}.gz", data), (f"q.{kind}.gz", gzip.compress(data)[:-3])):
        (directory / name).write_bytes(written)
        with contextlib.suppress(InputError):
            convert.convert(open_table(storage, name), storage, "out.parquet", {})


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
        f"left out: 1 line, the first of them:\n  line 3: seed is 'x'; it {SEED}\n",
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


def test_the_command_names_the_columns_that_the_job_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.csv").write_text("caption,key\na,k\n")
    job = {"prompts": str(tmp_path / "captions.csv"), "output": str(tmp_path / "out"), "device": "simulated"}
    options = {"prompts_storage_options": {"auto_mkdir": False}}
    with pytest.raises(InputError) as refused:
        open_prompts(JobConfig(**job, **options, columns={"prompt": "caption", "id": "key"}))
    _, command, rest = str(refused.value).split("`", 2)
    assert (
        rest == " makes of it (with --prompts-storage-options as the job has them), for the job without its `columns`"
    )
    result = called(*shlex.split(command)[1:])
    assert result.returncode == 0, result.stderr
    assert open_prompts(JobConfig(**(job | {"prompts": str(tmp_path / "captions.parquet")}))).columns == {
        "prompt": "prompt",
        "id": "id",
    }


def test_a_column_that_no_job_knows_costs_no_row_and_stays_what_it_is(converted: Convert, tmp_path: Path) -> None:
    """Also where Python can't hold its values."""
    times = pa.array([2**62 + 1, 1, None], pa.timestamp("ns"))
    table = pa.table({"prompt": ["a", "b", "c"], "time": times, "width": [64.0, float("inf"), None]})
    pq.write_table(table, tmp_path / "in.parquet")
    storage = Storage(str(tmp_path))
    result = convert.convert(open_table(storage, "in.parquet"), storage, "out.parquet", {})
    assert result.examples == [f"row 2: width is inf; it {WIDTH}"]
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


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt", "parquet"])
def test_what_is_not_compressed_as_its_name_says_is_refused(converted: Convert, kind: str, suffix: str) -> None:
    told = "is not a readable Parquet file" if kind == "parquet" else "can't be decompressed: .*; bring the whole file"
    with pytest.raises(InputError, match=told):
        converted(f"p.{kind}.{suffix}", b"prompt\na\n")


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_compressed_file_that_is_cut_off_is_refused(
    converted: Convert, tmp_path: Path, kind: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    pq.write_table(pa.table({"prompt": [f"prompt {number}" for number in range(1000)]}), tmp_path / "in.parquet")
    array = json.dumps([{"prompt": f"prompt {number}"} for number in range(1000)]).encode()
    data = compress((tmp_path / "in.parquet").read_bytes() if kind == "parquet" else array)
    told = "is not a readable Parquet file" if kind == "parquet" else "can't be decompressed"
    for size in (len(data) // 2, 20, 5):
        with pytest.raises(InputError, match=told):
            converted(f"p.{kind}.{suffix}", data[:size])


def test_bytes_that_are_damaged_within_a_compressed_file_are_told(converted: Convert) -> None:
    data = bytearray(gzip.compress(b"prompt\n" + b"".join(b"prompt %d\n" % number for number in range(5000))))
    data[200:300] = bytes(100)
    with pytest.raises(InputError, match="can't be decompressed"):
        converted("p.csv.gz", bytes(data))
