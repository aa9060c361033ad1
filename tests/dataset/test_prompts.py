"""The prompt dataset: what is found, what is refused, and the rows of a shard."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_batch.config.bounds import MAX_SEED
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.dataset.reader import GroupUndecoded, PromptDataset, PromptsChanged
from gaudi_batch.dataset.rows import PromptRow, RowRules, image_seed, make_row
from gaudi_batch.dataset.scan import row_spans
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.scheduling.events import Reading
from gaudi_batch.storage.store import Storage

RULES = RowRules(Bucket(64, 64, 20, 7.5), 1, None, 8)


def opened(prompts: Path | str, **fields: Any) -> PromptDataset:
    return open_prompts(JobConfig(prompts=str(prompts), output="out", device="simulated", **fields))


def all_rows(dataset: PromptDataset, shard_size: int = 16) -> list[PromptRow]:
    shards = plan_shards(row_spans(dataset, RULES), dataset.rows, ShardSizes(8, rows=shard_size))
    rows = [row for shard in shards for row in dataset.read(shard, RULES)[0]]
    return sorted(rows, key=lambda row: row.row)


def test_files_are_found_by_directory_glob_and_name(prompts: Path) -> None:
    assert opened(prompts).rows == 100
    assert opened(prompts / "part-[01].parquet").rows == 60
    assert opened(f"file://{prompts}/part-2.parquet").rows == 40


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """What has been logged."""
    monkeypatch.setattr(logging.getLogger("gaudi_batch"), "propagate", True)
    return lambda: caplog.text


@pytest.fixture
def linked(prompts: Path, tmp_path: Path) -> Path:
    """A directory of one row, and links to one of 100 and to a file of 7."""
    directory = tmp_path / "linked"
    (directory / "here").mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["here"]}), directory / "here/part-0.parquet")
    (directory / "there").symlink_to(prompts)
    (directory / "part-0.parquet").symlink_to(prompts / "part-0.parquet")
    return directory


def test_links_to_directories_and_files_are_followed(linked: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(linked)
    for where in (linked, tmp_path / "link"):
        assert opened(where).rows == 1 + 100 + 7
        assert opened(where / "*/*.parquet").rows == 1 + 100
        assert opened(where / "**/*.parquet").rows == 1 + 100 + 7
        assert opened(where / "t*/part-[01].parquet").rows == 60
    rows = all_rows(opened(linked))
    assert [row.prompt for row in rows[:8]] == ["here", *(f"prompt number {number}" for number in range(7))]


def test_links_in_a_circle_are_followed_once(linked: Path, warned: Callable[[], str]) -> None:
    (linked / "self").symlink_to(linked)
    (linked / "here/up").symlink_to("..")
    (linked / "there/back").symlink_to(linked)
    (linked / "self.parquet").symlink_to(linked)
    for where in (linked, linked / "**/*.parquet", linked / "**"):
        assert opened(where).rows == 1 + 100 + 7
    assert opened(linked / "*").rows == 7
    assert "'here/up', 'self', 'self.parquet' and 1 more: not followed" in warned()
    assert "'self': left out" not in warned()


def test_links_that_lead_nowhere_are_named(linked: Path, warned: Callable[[], str]) -> None:
    (linked / "unmounted").symlink_to("/nowhere/at/all")
    (linked / ".hidden").symlink_to("/nowhere/at/all")
    assert opened(linked).rows == 1 + 100 + 7
    assert "'unmounted': left out, as it is a link that leads nowhere" in warned()
    assert ".hidden" not in warned()
    (linked / "gone.parquet").symlink_to("/nowhere/at/all")
    for where in (linked, linked / "*.parquet"):
        with pytest.raises(InputError, match=r"'gone.parquet' leads nowhere"):
            opened(where)


def test_rows_that_are_there_under_two_names_are_named(prompts: Path, warned: Callable[[], str]) -> None:
    (prompts / "latest.parquet").symlink_to(prompts / "part-0.parquet")
    assert opened(prompts).rows == 107
    assert "'latest.parquet', 'part-0.parquet': taken under each of these names" in warned()


def test_what_a_directory_leaves_out_is_named(prompts: Path, warned: Callable[[], str]) -> None:
    data = (prompts / "part-0.parquet").read_bytes()
    (prompts / "day=1").mkdir()
    (prompts / "_temporary").mkdir()
    for name in ("a.PARQUET", "day=1/b.parq", "_temporary/c.parquet", ".d.parquet"):
        (prompts / name).write_bytes(data)
    (prompts / "x.parquet").mkdir()
    for name in ("_SUCCESS", "_metadata", "notes.txt", ".a.parquet.crc", "x.parquet/_SUCCESS", "parquet"):
        (prompts / name).write_bytes(b"")
    assert opened(prompts).rows == 100
    assert "'.d.parquet', '_temporary/c.parquet', 'a.PARQUET' and 1 more: left out" in warned()
    assert "notes.txt" not in warned()
    assert opened(prompts / "*.PARQUET").rows == 7


def test_directories_that_a_glob_of_files_leaves_out_are_named(linked: Path, warned: Callable[[], str]) -> None:
    assert opened(linked / "**").rows == 1 + 100 + 7
    assert "left out" not in warned()
    assert opened(linked / "*").rows == 7
    assert "'here', 'there': left out, as a glob takes files" in warned()


@pytest.mark.parametrize("name", ["x.parquet/part-0", "y.parquet.gz", "z.Parquet.zst"])
def test_what_may_be_parquet_by_a_part_of_its_name_is_named(
    name: str, prompts: Path, warned: Callable[[], str]
) -> None:
    (prompts / name).parent.mkdir(exist_ok=True)
    (prompts / name).write_bytes((prompts / "part-0.parquet").read_bytes())
    assert opened(prompts).rows == 100
    assert f"'{name}': left out" in warned()


@pytest.fixture
def output(prompts: Path) -> Path:
    """An output among the prompts, which a link leads to, too, and what a run has written there."""
    output = prompts / "run"
    for name in ("plan.parquet", "manifest.parquet", "manifest/000000.parquet", "run.json", "lease.json"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(b"no prompts")
    for name in ("images/000000-a/00000000-00.png", "throughput/host-0/000000-a.jsonl"):
        (output / name).parent.mkdir(parents=True)
        (output / name).write_bytes(b"no prompts")
    (prompts / "link").symlink_to("run")
    return output


@pytest.mark.parametrize("where", ["", "**/*.parquet", "**", "*"])
def test_an_output_among_the_prompts_is_no_prompt_by_any_name(
    where: str, prompts: Path, output: Path, warned: Callable[[], str]
) -> None:
    job = JobConfig(prompts=str(prompts / where), output=str(output), device="simulated")
    assert open_prompts(job).rows == 100
    by_link = job.model_copy(update={"output": str(prompts / "link")})
    assert open_prompts(by_link).rows == 100
    assert warned() == ""


def test_prompts_in_an_output_are_prompts(prompts: Path, output: Path) -> None:
    (output / "prompts").mkdir()
    (prompts / "part-0.parquet").rename(output / "prompts/part-0.parquet")
    (prompts / "part-1.parquet").rename(output / "part-1.parquet")
    for where, rows in (("", 60), ("prompts", 7), ("prompts/*.parquet", 7), ("*.parquet", 53), ("**/*.parquet", 60)):
        job = JobConfig(prompts=str(output / where), output=str(output), device="simulated")
        assert open_prompts(job).rows == rows


def test_a_directory_that_can_not_be_read_is_no_empty_one() -> None:
    with tempfile.TemporaryDirectory() as home:
        prompts = Path(home)
        prompts.chmod(0o755)
        for name in ("open", "closed", ".closed", "lost+found"):
            (prompts / name).mkdir()
            pq.write_table(pa.table({"prompt": ["p"]}), prompts / name / "part-0.parquet")
        user = os.geteuid()
        for name in (".closed", "lost+found"):
            (prompts / name).chmod(0)
        if user == 0:
            os.seteuid(65534)  # root may read all
        try:
            assert opened(prompts).rows == 2
        finally:
            os.seteuid(user)
        (prompts / "closed").chmod(0)
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(StorageError, match=r"Permission denied.*/closed"):
                opened(prompts)
            with pytest.raises(StorageError, match=r"Permission denied.*/closed"):
                opened(prompts / "*/*.parquet")
        finally:
            os.seteuid(user)


class _Signed(SimpleHTTPRequestHandler):
    """Serves files, and parts of them, to whoever has the signature."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        data = (Path(self.directory) / path.strip("/")).read_bytes()
        start, _, stop = self.headers.get("Range", f"bytes=0-{len(data) - 1}").removeprefix("bytes=").partition("-")
        if query != SIGNATURE:
            self.send_error(403)
            return
        part = data[int(start) : int(stop) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


SIGNATURE = "credential=a/b/c.parquet&signature=secret"


def test_the_signature_of_a_url_opens_its_file_and_is_no_part_of_its_name(prompts: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Signed, directory=str(prompts)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/part-0.parquet"
    try:
        dataset = opened(f"{url}?{SIGNATURE}")
        assert [file.name for file in dataset.files] == ["part-0.parquet"]
        assert len(all_rows(dataset)) == 7
        with pytest.raises(InputError, match="no such file") as refused:
            opened(f"{url}?signature=forged")
        assert "forged" not in str(refused.value)
    finally:
        server.shutdown()
        server.server_close()


def test_rows_are_numbered_over_the_files_in_sorted_order(prompts: Path) -> None:
    rows = all_rows(opened(prompts))
    assert [row.row for row in rows] == list(range(100))
    assert [row.prompt for row in rows] == [f"prompt number {number}" for number in range(100)]
    assert [row.id for row in rows] == [str(number) for number in range(100)]


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([None, 64, 128, 0, -8, 65, 2**31]),
            st.sampled_from([None, 0.0, 1.0, 7.5, -1.0, float("nan"), float("inf")]),
            st.sampled_from([None, 0, 1, 2, 3]),
        ),
        min_size=1,
        max_size=60,
    ),
    shard_size=st.integers(1, 40),
    group=st.integers(1, 30),
)
@settings(max_examples=examples(60))
def test_planned_shards_hold_each_row_once_in_its_own_bucket(
    tmp_path: Path, rows: list[tuple[Any, ...]], shard_size: int, group: int
) -> None:
    table = pa.table(
        {
            "prompt": ["p"] * len(rows),
            "place": range(len(rows)),
            "width": pa.array([row[0] for row in rows], pa.int64()),
            "guidance_scale": pa.array([row[1] for row in rows], pa.float64()),
            "num_images": pa.array([row[2] for row in rows], pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=group)
    dataset = opened(tmp_path / "p.parquet")
    for scattered in (False, True):
        spans = list(row_spans(dataset, RULES, scattered=scattered))
        plan = list(plan_shards(spans, dataset.rows, ShardSizes(8, rows=shard_size)))
        own_sizes = list(plan_shards(spans, dataset.rows, ShardSizes(8, cards=2)))
        for shards in (plan, own_sizes):
            seen = []
            for shard in shards:
                own, carried = dataset.read(shard, RULES)
                assert len(own) == shard.rows == carried.num_rows
                assert {row.bucket for row in own} == {shard.bucket}
                assert sum(row.num_images for row in own) == shard.images
                assert carried.column("place").to_pylist() == [row.row for row in own]
                seen += [row.row for row in own]
            assert sorted(seen) == list(range(len(rows)))


def test_columns_can_have_other_names(write_prompts: Callable[..., Path]) -> None:
    directory = write_prompts({"caption": ["a", "b"], "key": [7, 8], "note": ["x", "y"]})
    dataset = opened(directory, columns={"prompt": "caption", "id": "key"})
    assert [(row.id, row.prompt) for row in all_rows(dataset)] == [("7", "a"), ("8", "b")]
    assert dataset.carried.names == ["note"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "no such file or directory"),
        (lambda d: d.mkdir(), "no Parquet file"),
        (lambda d: (d.mkdir(), (d / "a.parquet").write_bytes(b"")), "is empty"),
        (lambda d: (d.mkdir(), (d / "a.parquet").write_bytes(b"hello" * 99)), "not a readable Parquet file"),
        (lambda d: (d.mkdir(), (d / "a.parquet").write_bytes(b"\xff" * 8 + b"PAR1")), "not a readable Parquet file"),
        (
            lambda d: (d.mkdir(), pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), d / "a.parquet")),
            "no rows",
        ),
        (lambda d: (d.mkdir(), pq.write_table(pa.table({"text": ["x"]}), d / "a.parquet")), "no column 'prompt'"),
        (lambda d: (d.mkdir(), pq.write_table(pa.table({"prompt": [1]}), d / "a.parquet")), "must be a string"),
    ],
)
def test_what_can_not_be_read_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message) as caught:
        opened(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_files_that_disagree_are_refused(write_prompts: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="disagree"):
        opened(write_prompts({"prompt": ["a"], "x": [1]}, {"prompt": ["b"], "x": [["list"]]}))


def test_a_column_that_only_some_files_have_is_null_in_the_others(write_prompts: Callable[..., Path]) -> None:
    dataset = opened(write_prompts({"prompt": ["a"], "seed": [3]}, {"prompt": ["b"], "mood": ["grim"]}))
    assert [row.seed for row in all_rows(dataset)] == [3, None]
    shards = plan_shards(row_spans(dataset, RULES), 2, ShardSizes(8, rows=8))
    assert [dataset.read(shard, RULES)[1].to_pylist() for shard in shards] == [[{"mood": None}], [{"mood": "grim"}]]


def spoil_first_column(path: Path, row_group: int) -> None:
    column = pq.ParquetFile(path).metadata.row_group(row_group).column(0)
    data = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))


def test_a_row_group_that_can_not_be_decoded_costs_only_its_own_rows(write_prompts: Callable[..., Path]) -> None:
    directory = write_prompts({"prompt": [f"prompt {n}" * 20 for n in range(90)]}, row_group_size=30)
    spoil_first_column(directory / "part-0.parquet", row_group=1)
    rows = all_rows(opened(directory), shard_size=24)
    assert [row.row for row in rows] == list(range(90))
    assert {row.row for row in rows if row.error} == set(range(30, 60))
    assert "row group 1 of 'part-0.parquet' can't be decoded" in str(rows[30].error)


def test_an_undecodable_row_group_costs_each_shape_its_own_rows_once(write_prompts: Callable[..., Path]) -> None:
    texts = [f"prompt {n}" * 20 for n in range(96)]
    directory = write_prompts({"prompt": texts, "width": [64, 128] * 48}, row_group_size=32)
    spoil_first_column(directory / "part-0.parquet", row_group=1)
    rows = all_rows(opened(directory), shard_size=48)
    assert [row.row for row in rows] == list(range(96))
    assert {row.row for row in rows if row.error} == set(range(32, 64))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1, 1], pa.date32()),
        pa.array([10**18 + 1, 1], pa.timestamp("ns")),
        pa.array([[1], [2]]),
        pa.array(["a", "b"], pa.string_view()),
        pa.array([b"\xff", b"b"], pa.binary_view()),
    ],
)
def test_odd_types_of_columns_fail_rows_at_most(write_prompts: Callable[..., Path], column: pa.Array) -> None:
    for name in ("id", "width", "seed", "carried"):
        dataset = opened(write_prompts(pa.table({"prompt": ["p", "q"], name: column}), name=name))
        rows = all_rows(dataset)
        assert [row.row for row in rows] == [0, 1]
        assert name != "carried" or not any(row.error for row in rows)


def test_a_carried_column_never_fails_a_row(write_prompts: Callable[..., Path]) -> None:
    rows = all_rows(opened(write_prompts({"prompt": ["a"], "n": [2**53 + 1]}, {"prompt": ["b"], "n": [0.5]})))
    assert [row.error for row in rows] == [None, None]


def test_text_that_is_not_utf8_fails_its_row_alone(write_prompts: Callable[..., Path]) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfeok")]
    )
    rows = all_rows(opened(write_prompts(pa.table({"prompt": broken}))))
    assert rows[0].error == "prompt can't be read as text: '\ufffd\ufffd'"
    assert rows[1].error is None


def test_dictionary_and_large_strings_are_strings(write_prompts: Callable[..., Path]) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["a", "b", "a"]).dictionary_encode(),
            "negative_prompt": pa.array(["x", None, "z"], pa.large_string()),
        }
    )
    rows = all_rows(opened(write_prompts(table)))
    assert [(row.prompt, row.negative_prompt) for row in rows] == [("a", "x"), ("b", ""), ("a", "z")]


@given(
    st.dictionaries(
        st.sampled_from(["prompt", "id", "negative_prompt", "seed", "width", "steps", "num_images", "guidance_scale"]),
        st.none() | st.text() | st.integers() | st.floats() | st.booleans() | st.binary() | st.lists(st.integers()),
    )
)
def test_no_value_of_a_row_raises(values: dict[str, Any]) -> None:
    row = make_row(3, values, RULES)
    assert row.error is None or "\n" not in row.error.replace(repr(values), "")
    if row.error is None:
        assert row.prompt.strip()
        assert row.num_images >= 1


@given(st.integers(0, MAX_SEED), st.text(), st.integers(0, 1000), st.none() | st.integers(0, MAX_SEED))
def test_seeds_fit_a_generator_and_depend_on_id_and_number_alone(
    run_seed: int, identity: str, image: int, seed: int | None
) -> None:
    row = PromptRow(1, identity, "p", "", seed, RULES.bucket, 1, None)
    other = PromptRow(2, identity, "q", "n", seed, Bucket(8, 8, 1, 0), 5, None)
    assert 0 <= image_seed(run_seed, row, image) <= MAX_SEED
    assert image_seed(run_seed, row, image) == image_seed(run_seed, other, image)


def test_the_seed_of_an_image_never_changes_between_versions() -> None:
    row = PromptRow(0, "cat-7", "p", "", None, RULES.bucket, 2, None)
    assert [image_seed(0, row, 0), image_seed(0, row, 1), image_seed(1, row, 0)] == [
        5578371787168392505,
        8544753772169437478,
        7794365734099006145,
    ]
    assert image_seed(9, PromptRow(0, "x", "p", "", 40, RULES.bucket, 2, None), 2) == 42


def read_task(dataset: PromptDataset, **known: Any) -> tuple[list[PromptRow], pa.Table, list[Reading]]:
    """Reads rows 5 to 45 of the second file, which has row groups of 20, as a card does."""
    shard = Shard(0, 1, 5, 45, RULES.bucket, 40, 40)
    announced: list[Reading] = []
    rows, carried = dataset.read(shard, RULES, ShardTask(shard, "a1", **known), announced.append)
    return rows, carried, announced


def test_rows_that_are_read_a_few_at_a_time_are_the_same(prompts: Path) -> None:
    dataset = opened(prompts)
    rows, carried, announced = read_task(dataset)
    assert [row.row for row in rows] == list(range(12, 52))
    spans = [range(20), range(20, 40), range(40, 53)]
    pieces = [range(12, 27), range(27, 47), range(47, 52)]
    assert announced == [Reading(n, spans[n], pieces[n], by_row=False) for n in range(3)]
    slowly = read_task(dataset, by_row=frozenset({0, 1, 2}))
    assert (slowly[0], slowly[1]) == (rows, carried)
    # Rows before those of the shard must be decoded, too: one step, in which all of the shard's are at stake.
    assert slowly[2][:2] == [Reading(0, spans[0], range(12, 27), by_row=True)] * 2
    assert slowly[2][2:16] == [Reading(0, spans[0], range(row, 27), by_row=True) for row in range(13, 27)]
    assert len(slowly[2]) == 16 + 20 + 5


def test_rows_that_are_not_to_be_read_fail_and_those_before_them_are_read(prompts: Path) -> None:
    dataset = opened(prompts)
    whole, all_carried, _ = read_task(dataset)
    unreadable = {1: (33, "it killed")}
    rows, carried, announced = read_task(dataset, by_row=frozenset({1}), unreadable=unreadable)
    lost = range(33 - 12, 47 - 12)
    assert [place for place, row in enumerate(rows) if row.error] == list(lost)
    assert {(row.error, row.unreadable, row.num_images) for row in rows if row.error} == {("it killed", True, 1)}
    kept = [place for place in range(40) if place not in lost]
    assert [rows[place] for place in kept] == [whole[place] for place in kept]
    assert carried.take(kept) == all_carried.take(kept)
    assert max(each.rows.start for each in announced if each.by_row) == 32


def test_a_row_group_that_can_t_be_decoded_is_for_another_card_to_try(prompts: Path) -> None:
    file = prompts / "part-1.parquet"
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    offset = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(file.read_bytes())
    data[offset : offset + 12] = b"\xff" * 12
    file.write_bytes(data)
    dataset = opened(prompts)
    with pytest.raises(GroupUndecoded) as caught:
        read_task(dataset)
    assert caught.value.group == 1
    rows, _, _ = read_task(dataset, undecoded={1: "said another card"})
    assert [row.row for row in rows if row.error] == list(range(27, 47))
    assert all(row.unreadable and "row group 1" in str(row.error) for row in rows if row.error)
    rows, _ = dataset.read(Shard(0, 1, 5, 45, RULES.bucket, 40, 40), RULES)
    assert [row.row for row in rows if row.error] == list(range(27, 47)), "the driver asks nobody else"


@pytest.mark.parametrize("sent", [True, False], ids=["sent along", "too large together"])
def test_a_card_reads_the_bytes_of_its_columns_and_a_footer_that_it_was_not_sent(
    sent: bool, write_prompts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sent:
        monkeypatch.setattr("gaudi_batch.dataset.discovery.FOOTER_BYTES", 0)
    texts = [f"prompt {row}" for row in range(64)]
    file = write_prompts({"prompt": texts, "data": [bytes(1000)] * 64}, row_group_size=32) / "part-0.parquet"
    dataset: PromptDataset = pickle.loads(pickle.dumps(opened(file.parent)))
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    own = range(begin, begin + column.total_compressed_size)
    read: list[range] = []
    get_range = Storage.get_range

    def noted(storage: Storage, path: str, start: int, stop: int) -> bytes:
        read.append(range(start, stop))
        return get_range(storage, path, start, stop)

    monkeypatch.setattr(Storage, "get_range", noted)
    rows, _ = dataset.read(Shard(0, 0, 32, 64, RULES.bucket, 32, 32), RULES)
    assert [row.prompt for row in rows] == texts[32:]
    footers = [each for each in read if each.stop == file.stat().st_size]
    assert bool(footers) is not sent
    assert all(each.start in own and each.stop <= own.stop for each in read if each not in footers)


@pytest.mark.parametrize("marked", [True, False])
def test_a_file_that_is_replaced_once_it_is_open_is_not_taken_for_undecodable(
    marked: bool, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the store has no mark of a version, as a plain web server has none."""
    if not marked:
        for module in ("reader", "prompt_file"):
            monkeypatch.setattr(f"gaudi_batch.dataset.{module}.mark_of", lambda info: "")
    dataset = opened(prompts)
    read_task(dataset)
    file = prompts / "part-1.parquet"
    file.write_bytes(b"\xff" * file.stat().st_size)
    other = Shard(0, 1, 0, 20, RULES.bucket, 20, 20)
    with pytest.raises(PromptsChanged, match="is not what it was when it was planned"):
        dataset.read(other, RULES, ShardTask(other, "a1"))
