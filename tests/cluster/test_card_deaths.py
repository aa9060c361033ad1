"""A card's process is killed in each of its phases: another takes its place, its shards are done again, no other waits.

A proxy before the S3 server holds the card in its phase until it is dead.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from faultproxy import Fault, FaultProxy, fault_proxy
from helpers import S3Server, wait_until

from benchmarks.chaos import card_processes
from gaudi_batch import JobConfig, run
from gaudi_batch.cluster.connection import attached
from gaudi_batch.errors import GaudiBatchError
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.storage.store import Storage

HELD = {
    "fetch": ("GET", "prompts.*parquet"),
    "upload": ("PUT", r"images/\d"),
    "commit": ("PUT", "manifest/"),
}
"""The requests of each phase. In the phase `generate`, which has none, the card is killed after an image was stored."""


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as started:
        yield started


@pytest.mark.parametrize(
    "phase", ["commit", *(pytest.param(phase, marks=pytest.mark.thorough) for phase in ("fetch", "generate", "upload"))]
)
def test_a_card_that_is_killed_costs_its_shards_in_hand_and_nothing_else(
    prompts: Path, tmp_path: Path, cluster: str, s3: S3Server, proxy: FaultProxy, phase: str
) -> None:
    here = Storage(f"s3://bucket/{tmp_path.name}", s3.options)
    for path in prompts.iterdir():
        here.put_file(f"prompts/{path.name}", str(path))
    job = JobConfig(
        prompts=f"s3://bucket/{tmp_path.name}/prompts",
        output=f"s3://bucket/{tmp_path.name}/out",
        storage_options=s3.options_at(proxy.port),
        device="simulated",
        simulated={"batch_seconds": 1.0},  # a run that goes on until a card has been killed, on a busy machine, too
        shard_size=8,
        cards=2,
    )
    output = OutputReader(here.at(f"{here.root}/out"))
    killed: list[int] = []

    def cards() -> list[int]:
        return card_processes(ray._private.worker._global_node.get_session_dir_path())

    def kill() -> None:
        wait_until(output.committed_shards)
        if phase in HELD:
            method, path = HELD[phase]
            fault = proxy.add(Fault("stall", method, path, count=2))
            wait_until(lambda: fault.hits)
        killed.append(next(card for card in cards() if card not in before))
        os.kill(killed[0], signal.SIGKILL)
        wait_until(lambda: killed[0] not in cards())
        proxy.clear()

    with attached(cluster):
        before = cards()  # of a run before, which is over and whose processes are still ending
        killer = threading.Thread(target=kill)
        killer.start()
        result = run(job)
        killer.join()
    assert killed
    assert result.exit_code == 0
    assert result.summary["images"] == 100
    assert sum(card["faults"] for card in result.summary["cards"].values()) == 1
    assert result.summary["retries"] <= 2 + 1, "more than the shards in its hand"
    rows = [row for _, table in output.commits() for row in table.column("row").to_pylist()]
    assert sorted(rows) == list(range(100))


def test_secrets_are_written_nowhere(
    prompts: Path, tmp_path: Path, cluster: str, s3: S3Server, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = ("tester-key-id", "tester-password")
    fields = {
        "prompts": str(prompts),
        "storage_options": s3.options,
        "device": "simulated",
        "simulated": {"batch_seconds": 0.01, "raise_rows": [3]},
        "cards": 2,
        "storage_patience": 2,
    }
    run(JobConfig(output=f"s3://bucket/{tmp_path.name}-good", **fields), address=cluster)
    with pytest.raises(GaudiBatchError) as caught:
        run(JobConfig(output="s3://never-there/out", **fields), address=cluster)
    assert not any(secret in str(caught.value) for secret in secrets)
    written = Storage(f"s3://bucket/{tmp_path.name}-good", s3.options)
    for path in written.filesystem.find(written.root):
        data = written.filesystem.cat_file(path)
        assert not any(secret.encode() in data for secret in secrets), path
    captured = capfd.readouterr()
    assert not any(secret in captured.out + captured.err for secret in secrets)
    with attached(cluster):
        session = Path(ray._private.worker._global_node.get_session_dir_path())
    for log in (session / "logs").glob("worker-*"):
        text = log.read_text(errors="replace")
        assert not any(secret in text for secret in secrets), log
