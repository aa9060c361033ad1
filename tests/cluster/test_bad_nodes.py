"""One bad node, one lying card or one deadly row costs what it must and nobody else anything: real nodes, real signals.

The head has no cards; each test adds nodes of its own to it and takes them away again.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faultproxy import Fault, FaultProxy, fault_proxy
from helpers import S3Server, read_manifest
from raynodes import RayCluster, add_cards, wait_for_card

from gaudi_batch.storage.store import Storage


def in_own_mounts(commands: str) -> tuple[str, ...]:
    """What runs a node with a view of the file system that these commands have changed."""
    return ("unshare", "--mount", "sh", "-c", f'{commands} && exec "$@"', "sh")


class Run:
    """A job on simulated cards, in a process of its own; its log is read as it comes."""

    def __init__(self, cluster: RayCluster, prompts: str | Path, output: str | Path, *flags: str) -> None:
        job = ("--device", "simulated", "--shard-size", "16", "--simulated.batch-seconds", "0.2")
        command = ("run", "--address", cluster.address, "--prompts", prompts, "--output", output, *job, *flags)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gaudi_batch", *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self.lines.append("")
            self._changed.notify_all()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, condition: Callable[[str], Any], seconds: float = 120) -> None:
        """Waits until the log is as it should be, or the job is over."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.log) or self.lines[-1:] == [""], seconds), self.log

    def end(self, code: int) -> str:
        self.wait_for(lambda log: False, 200)
        assert self.process.wait(timeout=60) == code, self.log
        return self.log


def write_prompts(path: Path, rows: int, group_rows: int = 8, **columns: list[Any]) -> Path:
    table = pa.table({"prompt": [f"prompt {row}" for row in range(rows)], **columns})
    pq.write_table(table, path, row_group_size=group_rows)
    return path


def statuses(output: Path) -> list[tuple[int, str]]:
    return sorted((row["row"], row["status"]) for row in read_manifest(output))


READ_ONLY = "mount --bind {output} {output} && mount -o remount,ro,bind {output}"
NO_ROOM = "mount -t tmpfs -o size=4k none {output}/images && mount -t tmpfs -o size=4k none {output}/throughput"
OTHER_PROMPTS = "mount --bind {other} {prompts}"


@pytest.mark.thorough
@pytest.mark.parametrize(
    "failures",
    [
        {READ_ONLY: "Read-only file system", NO_ROOM: "No space left on device"},
        {OTHER_PROMPTS: "is not what it was when it was planned"},
    ],
    ids=["output", "prompts"],
)
def test_nodes_whose_storage_fails_do_not_end_the_run(
    failures: dict[str, str], nodes: RayCluster, tmp_path: Path
) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.parquet", 320), tmp_path / "out"
    other = write_prompts(tmp_path / "other.parquet", 8)
    for place in ("images", "throughput"):
        (output / place).mkdir(parents=True)
    places = {"output": output, "prompts": prompts, "other": other}
    for mounts in failures:
        add_cards(nodes, 2, wrapper=in_own_mounts(mounts.format(**places)))
    add_cards(nodes, 2)
    nodes.wait_for(2 + len(failures))
    slow = ("--simulated.load-seconds", "1", "--simulated.batch-seconds", "0.5")
    log = Run(nodes, prompts, output, *slow).end(0)
    assert statuses(output) == [(row, "ok") for row in range(320)]
    assert all(message in log for message in failures.values()), log
    stored = {str(path.relative_to(output)) for path in output.glob("images/*/*.png")}
    assert stored == {row["path"] for row in read_manifest(output)}


@pytest.mark.thorough
def test_a_row_that_takes_its_node_down_costs_four_nodes_and_nobody_else(nodes: RayCluster, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.parquet", 320), tmp_path / "out"
    for _ in range(2):
        add_cards(nodes, 2)
    nodes.wait_for(3)
    run = Run(nodes, prompts, output, "--simulated.kill-node-rows", "[100]")
    lost = 0
    while True:
        gone = 2 * (lost + 1)
        run.wait_for(lambda log: log.count("left with its node") >= gone)  # noqa: B023 it is called at once
        if run.process.poll() is not None or run.lines[-1] == "":
            break
        lost += 1
        assert lost <= 4, run.log
        add_cards(nodes, 2)
    log = run.end(3)
    assert lost == 4
    assert statuses(output) == [(row, "failed" if row == 100 else "ok") for row in range(320)]
    (error,) = (row["error"] for row in read_manifest(output) if row["error"])
    assert "its node was lost" in error
    assert "quarantined" not in log


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as started:
        yield started


@pytest.mark.thorough
@pytest.mark.parametrize(("cards", "group_rows"), [(1, 8), (2, 40)])
def test_rows_whose_reading_kills_are_found_and_no_other_row_fails(
    cards: int, group_rows: int, nodes: RayCluster, s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Whoever reads the bytes of one row group is killed, by the server's end of the connection. The group has a part
    of a shard's rows, or those of several shards."""
    group = 1
    rows = range(group * group_rows, (group + 1) * group_rows)
    prompts = write_prompts(tmp_path / "prompts.parquet", 160, group_rows)
    column = pq.ParquetFile(prompts).metadata.row_group(group).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    here = Storage(f"s3://bucket/{tmp_path.name}", s3.options)
    here.put_file("prompts.parquet", str(prompts))
    deadly = range(begin, begin + column.total_compressed_size)
    fault = proxy.add(Fault("kill client", "GET", r"prompts\.parquet", first_byte=deadly))
    add_cards(nodes, cards)
    nodes.wait_for(2)
    output = tmp_path / "out"
    run = Run(
        nodes,
        f"s3://bucket/{tmp_path.name}/prompts.parquet",
        output,
        "--prompts-storage-options",
        f'{{"key": "tester-key-id", "secret": "tester-password", "client_kwargs":'
        f' {{"endpoint_url": "http://127.0.0.1:{proxy.port}", "region_name": "us-east-1"}}}}',
    )
    log = run.end(3)
    assert statuses(output) == [(row, "failed" if row in rows else "ok") for row in range(160)]
    assert fault.hits <= 5 * cards, log
    assert "quarantined" not in log
    errors = {row["error"] for row in read_manifest(output) if row["error"]}
    assert all(f"died reading this row, or one before it in row group {group}" in error for error in errors)


@pytest.mark.thorough
def test_a_card_that_has_no_memory_to_decode_costs_no_row(nodes: RayCluster, tmp_path: Path) -> None:
    """All row groups but the first need 200 MB; one card's address space is limited to little more than it has."""
    output, rows = tmp_path / "out", 64
    prompts = tmp_path / "prompts.parquet"
    blob = bytes(25_000_000)
    schema = pa.schema({"prompt": pa.string(), "blob": pa.binary()})
    with pq.ParquetWriter(prompts, schema, compression="zstd", use_dictionary=False) as writer:
        for group in range(rows // 8):
            texts = [f"prompt {row}" for row in range(8 * group, 8 * group + 8)]
            writer.write_table(pa.table({"prompt": texts, "blob": [blob if group else b""] * 8}, schema=schema))
    starved = add_cards(nodes, 1)
    add_cards(nodes, 1)
    nodes.wait_for(3)
    run = Run(nodes, prompts, output, "--carry", "*", "--shard-size", "8", "--simulated.load-seconds", "8")
    card = wait_for_card(starved)
    used = int(Path(f"/proc/{card}/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + 150_000_000
    resource.prlimit(card, resource.RLIMIT_AS, (limit, limit))
    log = run.end(0)
    assert statuses(output) == [(row, "ok") for row in range(rows)]
    assert re.search(r"can't be decoded: (Arrow)?MemoryError|malloc of size", log), log


def test_a_card_that_paints_wrong_now_and_then_is_quarantined_and_costs_no_row(
    nodes: RayCluster, tmp_path: Path
) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.parquet", 1600), tmp_path / "out"
    add_cards(nodes, 4)
    nodes.wait_for(2)
    lying = ("--simulated.lying-modules", "[2]", "--simulated.lying-share", "0.05")
    log = Run(nodes, prompts, output, *lying, "--simulated.batch-seconds", "0.15").end(0)
    assert statuses(output) == [(row, "ok") for row in range(1600)]
    assert re.findall(r"module (\d)\) is quarantined: \d+ times in \d+ images it failed", log) == ["2"]


@pytest.mark.thorough
def test_large_images_have_a_time_limit_of_their_own(nodes: RayCluster, tmp_path: Path) -> None:
    """A small batch takes 0.05 s, a large one 6 s: longer than limits.batch, and than ten small ones."""
    sizes = [128 if row % 4 == 3 else 64 for row in range(96)]
    prompts, output = write_prompts(tmp_path / "prompts.parquet", 96, width=sizes), tmp_path / "out"
    add_cards(nodes, 2)
    nodes.wait_for(2)
    times = ("--simulated.batch-seconds", "0.05", "--simulated.seconds-by-size", "{128x64: 6}")
    log = Run(nodes, prompts, output, *times, "--limits.batch", "5", "--limits.first-batch", "60").end(0)
    assert statuses(output) == [(row, "ok") for row in range(96)]
    assert "took longer" not in log


@pytest.mark.thorough
def test_a_size_that_takes_longer_than_its_limit_everywhere_is_set_aside_by_name(
    nodes: RayCluster, tmp_path: Path
) -> None:
    sizes = [128 if row % 4 == 3 else 64 for row in range(160)]
    prompts, output = write_prompts(tmp_path / "prompts.parquet", 160, width=sizes), tmp_path / "out"
    add_cards(nodes, 3)
    nodes.wait_for(2)
    times = ("--simulated.batch-seconds", "0.05", "--simulated.seconds-by-size", "{128x64: 60}")
    log = Run(nodes, prompts, output, *times, "--limits.first-batch", "5", "--steps", "20").end(1)
    assert "stopped: batches of 128x64, 20 steps take longer than 5 s (limits.first_batch)" in log
    assert "quarantined" not in log
    made = [row for path in output.glob("manifest/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["row"] for row in made) == [row for row in range(160) if row % 4 != 3]
    assert {row["status"] for row in made} == {"ok"}
