"""Bytes from elsewhere give a value or the product's own error in one line, and nothing else is raised."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import Unfenced, examples
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_batch.cli.check import check
from gaudi_batch.cli.flags import job_from
from gaudi_batch.cli.parser import parse
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.dataset.rows import PromptRow, RowRules, make_row
from gaudi_batch.dataset.scan import row_spans
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.output import manifest
from gaudi_batch.output.holder import read_lease
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.reporting.status import describe_status, read_status
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import load_yaml

RULES = RowRules(Bucket(64, 64, 20, 7.5), 1, None, 8)


@contextlib.contextmanager
def own_errors(*others: type[Exception]) -> Iterator[None]:
    """Lets the product's own errors pass that are one printable line."""
    message, expected = "", tuple[type[Exception], ...]([InputError, StorageError, *others])
    try:
        yield
    except expected as error:
        message = str(error)
    assert message.isprintable(), message
    assert len(message) < 20_000


texts = st.text(max_size=20) | st.sampled_from(["prompt", "\x1b[31m", "a\nb", "\u202e", "x" * 3000, "1e999"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spoiled(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes that are cut, flipped, or have something put in their place."""
    changed_data = bytearray(data)
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(changed_data) - 1))
        changed_data[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        # The footer decides most, and is at the end.
        place = len(changed_data) - 1 - draw(st.integers(0, min(len(changed_data) - 1, 800)))
        changed_data[place : place + draw(st.integers(1, 8))] = draw(st.binary(min_size=1, max_size=8))
    return bytes(changed_data[: draw(st.just(len(changed_data)) | st.integers(0, len(changed_data)))])


def changed(values: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """JSON like `values`, with other values, more of them or fewer; or with spoiled bytes."""
    text = json.dumps(values).encode()
    names = st.sampled_from(sorted(values)) | texts
    other = st.dictionaries(names, json_values, max_size=4).map(lambda new: json.dumps(values | new).encode())
    fewer = names.map(lambda name: json.dumps({k: v for k, v in values.items() if k != name}).encode())
    return st.binary(max_size=50) | other | fewer | spoiled(text) | json_values.map(lambda v: json.dumps(v).encode())


# -- the job ----------------------------------------------------------------------------------------------------

fields = st.sampled_from([*JobConfig.model_fields, "stepz"]) | texts
mappings = st.dictionaries(
    fields, json_values | st.dictionaries(texts | st.sampled_from(["config", "type"]), json_values, max_size=3)
)


@given(mappings)
def test_any_mapping_is_a_job_or_refused(given_fields: dict[str, Any]) -> None:
    with own_errors():
        JobConfig.load(None, {"prompts": "p", "output": "o", "device": "simulated"} | given_fields)
    with own_errors():
        JobConfig.load(None, given_fields)


yaml_texts = mappings.map(lambda value: yaml.safe_dump(value, allow_unicode=True)) | st.lists(
    st.sampled_from(
        ["&a ", "*a", "[", "]", "{", "}", ": ", ", ", "- ", "!!python/object:os.system ", "0x", "1:1:1", "\n"]
    )
    | texts
).map("".join)


@given(yaml_texts)
def test_any_job_file_is_a_job_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with own_errors():
        JobConfig.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "seed: 0x" + "f" * 6000,
        "seed: " + "9" * 6000,
        "seed: &a [*a]",
        "storage_options: &a {b: *a}",
        "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}, *a{n}]\n" for n in range(40)),
        "x: " + "[" * 5000,
        "1: 2\n? [3]\n: 4",
        "? {a: b}\n: c",
        "prompts: 2020-13-45",
        "#" * (1 << 20) + "\nseed: 1",
        "!!binary x",
        "prompts: !!python/object/apply:os.system [id]",
    ],
)
def test_a_job_file_can_not_take_the_machine(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        JobConfig.load(tmp_path / "job.yaml")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500


def test_a_job_file_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match="is not YAML"):
        JobConfig.load("/dev/zero")


def test_aliases_may_be_used() -> None:
    assert load_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


flags = st.sampled_from(
    [
        "run",
        "check",
        "status",
        "bench",
        "tune",
        "demo",
        "emulate",
        "--",
        "--seed",
        "--columns",
        "--columns.id",
        "--columns.",
        "--storage-options",
        "--storage-options.a.b",
        "--storage-options.=1",
        "--gaudi.config",
        "--gaudi.config.x=1",
        "--simulated.raise-rows",
        "--max-failed",
        "--cards",
        "--device",
        "--prompts",
        "--output",
        "--grace",
        "--verbose",
        "--address",
        "job.yaml",
        "simulated",
        "1",
        "5%",
        "x%",
        "{a: b}",
        "[1]",
        "null",
        "",
    ]
) | texts.filter(lambda text: text not in ("-h", "--help", "--version"))


@given(st.lists(flags, max_size=8))
@settings(max_examples=examples(50))
def test_any_command_line_is_parsed_or_refused(arguments: list[str]) -> None:
    # What argparse quotes is made printable where it is printed.
    with contextlib.suppress(SystemExit, InputError):
        parsed = parse(arguments)
        if "job" in vars(parsed):
            job_from(parsed)


# -- the prompts ------------------------------------------------------------------------------------------------

kinds = st.recursive(
    st.sampled_from(
        [
            pa.string(),
            pa.large_string(),
            pa.string_view(),
            pa.binary(),
            pa.binary_view(),
            pa.int8(),
            pa.int64(),
            pa.uint64(),
            pa.float16(),
            pa.float32(),
            pa.float64(),
            pa.bool_(),
            pa.null(),
            pa.date32(),
            pa.date64(),
            pa.timestamp("s"),
            pa.timestamp("ns", "Europe/Rome"),
            pa.time32("ms"),
            pa.time64("ns"),
            pa.duration("us"),
            pa.decimal128(38, 10),
            pa.decimal256(76, 0),
            pa.binary(4),
        ]
    ),
    lambda inner: st.one_of(
        st.builds(pa.list_, inner),
        st.builds(lambda kind: pa.struct([("a\x1b\n", kind)]), inner),
        st.builds(lambda kind: pa.map_(pa.string(), kind), inner),
        st.just(pa.dictionary(pa.int32(), pa.string())),
    ),
    max_leaves=3,
)
names = st.sampled_from(
    [
        "prompt",
        "id",
        "negative_prompt",
        "seed",
        "width",
        "height",
        "steps",
        "guidance_scale",
        "num_images",
        "path",
        "\x1b[31m",
        "a\nb",
        "\0",
        "\u202e",
        "..",
        "",
    ]
)


def column(kind: pa.DataType, numbers: list[int | None]) -> pa.Array:
    """A column of a type, its values made of bytes that mean what they may."""
    if pa.types.is_dictionary(kind):
        return pa.array([None if n is None else f"v{n}" for n in numbers]).dictionary_encode().cast(kind)
    if pa.types.is_nested(kind):
        children = [column(field.type, numbers) for field in (kind.field(i) for i in range(kind.num_fields))]
        if pa.types.is_struct(kind):
            return pa.StructArray.from_arrays(children, [field.name for field in kind])
        if pa.types.is_map(kind):
            offsets = pa.array(range(len(numbers) + 1), pa.int32())
            keys = pa.array([f"k{n}" for n in numbers])
            return pa.MapArray.from_arrays(offsets, keys, column(kind.item_type, numbers))
        return pa.ListArray.from_arrays(pa.array(range(len(numbers) + 1), pa.int32()), children[0]).cast(kind)
    if pa.types.is_null(kind):
        return pa.nulls(len(numbers))
    text = [None if n is None else f"{n} \x1b[31m\n\u202e" * (1 + abs(n) % 7) for n in numbers]
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([None if n is None else n.to_bytes(9, "big", signed=True)[-4:] for n in numbers], kind)
    if pa.types.is_boolean(kind):
        return pa.array([None if n is None else bool(n % 2) for n in numbers])
    if kind in (pa.string(), pa.large_string(), pa.string_view()):
        return pa.array(text, pa.string()).cast(kind) if kind != pa.string_view() else pa.array(text, kind)
    if kind in (pa.binary(), pa.binary_view()):
        return pa.array([None if t is None else t.encode() + b"\xff" for t in text], kind)
    if pa.types.is_decimal(kind):
        return pa.array([None if n is None else n % 10**9 for n in numbers], pa.int64()).cast(kind)
    if pa.types.is_floating(kind):
        return pa.array([None if n is None else float(n) for n in numbers], pa.float64()).cast(kind, safe=False)
    whole = pa.array(numbers, pa.int64())
    if pa.types.is_integer(kind):
        return whole.cast(kind, safe=False)
    width = {32: pa.int32(), 64: pa.int64()}[kind.bit_width]
    return whole.cast(width, safe=False).view(kind)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(0, 5))
    small = st.none() | st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 64, 512])
    columns = draw(st.lists(st.tuples(names, kinds), max_size=5))
    if draw(st.booleans()):
        columns = [("prompt", pa.string()), *((name, kind) for name, kind in columns if name != "prompt")]
    arrays = [column(kind, draw(st.lists(small, min_size=rows, max_size=rows))) for _, kind in columns]
    return pa.Table.from_arrays(arrays, names=[name for name, _ in columns])


def write(path: Path, table: pa.Table, **options: Any) -> bool:
    """Writes a Parquet file of a table, unless Parquet has no place for a type of it."""
    try:
        pq.write_table(table, path, **options)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return False
    return True


def read_all(prompts: Path) -> int:
    """Opens, plans and reads a dataset as a job does; returns the number of its rows."""
    config = JobConfig(prompts=str(prompts), output="out", device="simulated")
    dataset = open_prompts(config)
    shards = list(plan_shards(row_spans(dataset, RULES), dataset.rows, ShardSizes(2, rows=4)))
    count = 0
    for shard in shards:
        rows, carried = dataset.read(shard, RULES)
        assert len(rows) == shard.rows
        assert not carried.column_names or carried.num_rows == len(rows)
        assert all(row.error is None or row.error.isprintable() for row in rows)
        count += len(rows)
        failures = {row.row: row.error or "x" for row in rows}
        info = CommitInfo(0, "a", "c", "n", None, len(rows), len(rows), 0, ThroughputTotals())
        assert manifest.read(manifest.build(rows, carried, {}, failures, 0, info))[1] == info
    assert count == dataset.rows
    return count


@given(tables())
@settings(max_examples=examples(150))
def test_any_schema_is_read_or_refused(tmp_path: Path, table: pa.Table) -> None:
    if write(tmp_path / "p.parquet", table, row_group_size=2):
        with own_errors():
            assert read_all(tmp_path / "p.parquet") == len(table)


@given(tables(), tables())
@settings(max_examples=examples(50))
def test_any_two_files_are_read_together_or_refused(tmp_path: Path, one: pa.Table, two: pa.Table) -> None:
    (tmp_path / "d").mkdir(exist_ok=True)
    if write(tmp_path / "d/1.parquet", one) and write(tmp_path / "d/2.parquet", two):
        with own_errors():
            assert read_all(tmp_path / "d") == len(one) + len(two)


def parquet(**options: Any) -> bytes:
    table = pa.table(
        {
            "prompt": [f"prompt {n}" for n in range(12)],
            "id": [f"i{n}" for n in range(12)],
            "width": [64, None, 128] * 4,
            "topic": pa.array(["a", "b", None] * 4).dictionary_encode(),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=5, **options)
    return buffer.getvalue()


PARQUETS = [parquet(), parquet(compression="none", use_dictionary=False), parquet(compression="zstd")]


@given(st.sampled_from(PARQUETS).flatmap(spoiled))
@settings(max_examples=examples(400))
def test_a_spoiled_parquet_file_is_read_as_far_as_it_can_be_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(data)
    with own_errors():
        read_all(path)


values = st.none() | texts | st.integers() | st.floats() | st.decimals(allow_nan=True) | st.dates() | json_values


@given(st.dictionaries(names, values))
def test_any_row_is_a_row_with_a_printable_reason(cells: dict[str, Any]) -> None:
    row = make_row(3, cells, RULES)
    assert row.error is None or row.error.isprintable()


# -- the records ------------------------------------------------------------------------------------------------

RECORD = {
    "job": {"device": "simulated", "shard_size": 8},
    "fingerprint": {"threads": None},
    "versions": {},
    "created_at": "2026-11-23T00:00:00+00:00",
    "rows": 3,
    "images": 3,
    "stacks": [{"torch": "2.13.0"}],
}
LEASE = {
    "driver": "abcde", "host": "h", "machine": "m", "pid": 7, "started": "9", "beat": 1, "dead": [], "released": False
}  # fmt: skip
COUNTERS = {"watts": 612.4, "temperature_c": 84, "utilisation": 0.9, "memory_used_mb": 1.0, "throttled": "thermal"}
CARD = {"state": "ready", "images": 3, "images_per_s": 1.5, "faults": 0, "energy_j": 1.0, **COUNTERS}
PROGRESS = {
    "time": "2026-11-23T00:00:00Z",
    "images_missing": 0,
    "failed_rows": 0,
    "images_per_s": 1.0,
    "seconds_left": 3,
    "cards": {"n-0": CARD},
    "faults": [{"time": "t", "card": "n-0", "what": "died"}],
}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A run of three shards."""
    records = Ledger(Storage(str(tmp_path / "out"), retry_timeout_s=0.1), Unfenced())
    records.put_plan([Shard(number, 0, number, number + 1, RULES.bucket, 1, 1) for number in range(3)])
    records.storage.put("run.json", json.dumps(RECORD).encode())
    return records


@given(changed(RECORD))
def test_any_run_json_is_a_run_or_refused(ledger: Ledger, data: bytes) -> None:
    ledger.storage.put("run.json", data)
    with own_errors():
        record = ledger.run()
        assert record is not None
        assert isinstance(record.job["device"], str)
        assert record.threads is None or record.threads >= 1
        assert record.rows >= 0 <= record.images
        assert all(isinstance(stack, dict) for stack in record.stacks or ())


@given(st.binary(max_size=50) | st.deferred(lambda: spoiled(_plan())))
@settings(max_examples=examples(150))
def test_any_plan_is_a_plan_or_refused(ledger: Ledger, data: bytes) -> None:
    ledger.storage.put("plan.parquet", data)
    with own_errors():
        for shard in ledger.plan(2**63):
            assert all(isinstance(value, int) for value in (shard.number, shard.file, shard.start, shard.images))
            assert str(shard.bucket)


def _plan() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        written = Ledger(Storage(directory), Unfenced())
        written.put_plan([Shard(number, 0, number, number + 1, RULES.bucket, 1, 1) for number in range(3)])
        return written.storage.get("plan.parquet") or b""


@given(tables())
@settings(max_examples=examples(40))
def test_any_table_is_a_plan_or_refused(ledger: Ledger, table: pa.Table) -> None:
    buffer = io.BytesIO()
    with contextlib.suppress(pa.ArrowNotImplementedError, pa.ArrowInvalid):
        pq.write_table(table, buffer)
        ledger.storage.put("plan.parquet", buffer.getvalue())
        with own_errors():
            ledger.plan(2**63)


def _manifest() -> bytes:
    rows = [PromptRow(number, str(number), "p", "", None, RULES.bucket, 1, "bad") for number in range(3)]
    carried = pa.table({"topic": ["a", "b", "c"]})
    info = CommitInfo(0, "abcde0", "n-0", "n", None, 3, 3, 0, ThroughputTotals())
    return manifest.build(rows, carried, {}, {row.row: "bad" for row in rows}, 0, info)


@given(st.binary(max_size=50) | spoiled(_manifest()))
@settings(max_examples=examples(200))
def test_any_manifest_is_a_commit_or_none(data: bytes) -> None:
    with own_errors(ValueError):
        table, info = manifest.read(data)
        assert info.rows >= 0
        assert table.num_rows >= 0


INFO = json.loads(pq.read_schema(io.BytesIO(_manifest())).metadata[b"gaudi_batch"])


@given(changed(INFO) | st.dictionaries(st.sampled_from(sorted(INFO["sums"])), json_values).map(
    lambda new: json.dumps(INFO | {"sums": INFO["sums"] | new}).encode()
))  # fmt: skip
def test_any_info_of_a_commit_can_be_added_up_or_is_none(data: bytes) -> None:
    table = pq.read_table(io.BytesIO(_manifest())).replace_schema_metadata({b"gaudi_batch": data})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    with own_errors(ValueError):
        _, info = manifest.read(buffer.getvalue())
        assert isinstance(info.attempt, str)
        assert isinstance(info.card, str)
        (ThroughputTotals() + info.sums).describe()
        assert info.shard + info.rows + info.failed_rows + info.images >= 0


@given(changed(LEASE), changed(PROGRESS), changed({"state": "complete", "reason": None}))
@settings(max_examples=examples(150))
def test_status_says_what_it_can_of_any_records(ledger: Ledger, lease: bytes, progress: bytes, summary: bytes) -> None:
    ledger.storage.put("run.json", json.dumps(RECORD).encode())
    for name, data in (("lease.json", lease), ("progress.json", progress), ("summary.json", summary)):
        ledger.storage.put(name, data)
    read_lease(ledger.storage)
    status = read_status(ledger, watch_s=0.0)
    json.dumps(status)
    assert all(line.isprintable() for line in describe_status(status).splitlines())
    assert len(describe_status(status).split("\n")) < 60


def test_what_argparse_quotes_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    from gaudi_batch.cli.main import main

    assert main(["run", "--\x1b[31m\nforged:\u202e"]) == 2
    log = capsys.readouterr().err
    assert re.fullmatch(r"gaudi-batch: [^\n]*\n", log)
    assert log[:-1].isprintable()


def test_check_of_hostile_names_is_printable(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["p"], "\x1b[31m\nbucket   forged": [1]}), tmp_path / "p.parquet")
    config = JobConfig(
        prompts=str(tmp_path), output=str(tmp_path / "out"), device="simulated", model="a\nmodel  forged"
    )
    text = check(config).text
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\nbucket   forged" not in text
