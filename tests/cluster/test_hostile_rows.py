"""What the user's data says is data: never a path, code, markup, or a line of its own in what a person reads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import called, command_line, read_manifest
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.pipelines.base import Item
from gaudi_batch.plan import Bucket
from gaudi_batch.text import describe_error, one_line, short_repr

TEXTS = [
    "../../../../etc/passwd",
    "/abs/olute",
    "..",
    "a\0b",
    "one\ntwo\r\nthree\x85four\u2028five",
    "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b1m",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[bold red]markup[/] {0} {prompt} %s %(x)s ${HOME} `id` $(id)",
    "\u202egnp.exe\u202c \u2066isolated\u2069 \u200f\ufeff",
    "x" * 10_240,
    "'; DROP TABLE images; --",
    "12:00:00 complete: 1000000 images, 0 failed rows",
    "__import__('os').system('id')",
    "c\u0327o\U0001f7e1",
]
FILES = ["plain", "a..", "a\nb", "\x1b[31mred", "\u202eterceS", "<b>", "[*]", "%s {x}", "#?&"]


def harmless(text: str) -> bool:
    return all(char.isprintable() for line in text.split("\n") for char in line)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A dataset with such ids, prompts, values, columns and file names; every third row can't be run."""
    directory = tmp_path / "prompts"
    directory.mkdir()
    table = pa.table(
        {
            "id": TEXTS,
            "prompt": TEXTS,
            "negative_prompt": TEXTS[::-1],
            "width": [text if number % 3 == 2 else None for number, text in enumerate(TEXTS)],
            **{text: TEXTS for text in TEXTS},
            "path": TEXTS,
            "input_path": TEXTS,
        }
    )
    for name in FILES:
        pq.write_table(table, directory / f"{name}.parquet")
    plain = directory / f"{FILES[0]}.parquet"
    (directory / os.fsdecode(b"not utf-8 \xff.parquet")).write_bytes(plain.read_bytes())
    return directory


@pytest.mark.usefixtures("thread_cards")
def test_hostile_rows_stay_rows(hostile: Path, tmp_path: Path, cluster: str) -> None:
    output = tmp_path / "out"
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    job = ("--prompts", hostile, "--output", output, "--device", "simulated", "--simulated.batch-seconds", "0.01")
    run = called("run", *job, "--cards", "2", "--address", cluster)
    assert run.returncode == 3, run.stderr
    others = [
        called("check", *job),
        called("check", *job, "--strict"),
        called("status", output),
        called("status", output, "--json"),
        command_line("run", *job, "--columns.seed", "\x1b[31m\nforged"),
        called("run", *job, "--seed", "1", "--address", cluster),
    ]
    assert [ended.returncode for ended in others] == [0, 2, 0, 0, 2, 2]
    for ended in (run, *others):
        assert harmless(ended.stdout), ended.stdout
        assert harmless(ended.stderr), ended.stderr
    forged = [
        line for ended in (run, *others) for line in ended.stderr.splitlines() if not re.match(r"\d\d:\d\d:", line)
    ]
    assert forged == []
    rows = {(row["row"], row["image_index"]): row for row in read_manifest(output)}
    assert len(rows) == len(TEXTS) * (len(FILES) + 1)
    for (number, _), row in rows.items():
        text = TEXTS[number % len(TEXTS)]
        assert row["id"] == row["prompt"] == row["input_input_path"] == row["input_path"] == text
        assert all(row[column] == text for column in TEXTS)
        assert row["status"] == ("failed" if number % len(TEXTS) % 3 == 2 else "ok")
        assert row["error"] is None or harmless(row["error"])
    own = r"(run|progress|summary|lease)\.json|report\.html|(plan|manifest)\.parquet|manifest/\d{6}\.parquet"
    own += r"|images/\d{6}-\w+/\d{8}-00\.png|images/metadata\.parquet|timeline/\w+-\d{6}\.jsonl|log/\w+-\d{6}\.log"
    for path in {path for path in tmp_path.rglob("*") if path.is_file()} - before:
        name = path.relative_to(output).as_posix()
        assert re.fullmatch(rf"{own}|throughput/[\w.-]+/\d{{6}}-\w+\.jsonl", name), name
        if path.suffix in (".json", ".jsonl"):
            assert harmless(path.read_text(encoding="ascii"))


@pytest.mark.torch
def test_hostile_prompts_are_only_text_to_a_pipeline() -> None:
    from gaudi_batch import JobConfig
    from gaudi_batch.pipelines.cpu import CpuPipeline
    from gaudi_batch.pipelines.sources import describe_model

    model = describe_model(JobConfig(prompts="p", output="o", model="builtin:shapes", device="cpu"))
    items = [Item(row, 0, text, text[::-1], row) for row, text in enumerate(TEXTS)]
    made = CpuPipeline(model, 1, "float32").generate(Bucket(64, 64, 2, 7.5), items)
    assert made.images.shape == (len(TEXTS), 64, 64, 3)
    assert np.isfinite(made.images).all()
    assert made.truncated[TEXTS.index("x" * 10_240)]


@given(st.text() | st.sampled_from(TEXTS) | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_an_error_that_quotes_a_prompt_is_one_printable_line(text: str) -> None:
    for line in (
        describe_error(RuntimeError(f"can't do {text}")),
        one_line(text),
        short_repr(text),
        short_repr([text]),
    ):
        assert line.isprintable()
        assert len(line) <= 500
