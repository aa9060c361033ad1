"""A driver that is cut off from storage and another that takes its run over: nothing committed is written over."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from faultproxy import Fault, FaultProxy, fault_proxy
from helpers import S3Server, wait_until
from raynodes import follow

from gaudi_batch.storage.store import Storage

QUICK = {
    "LEASE_TTL_S": 8,
    "RENEW_DEADLINE_S": 4,
    "MANIFEST_TIMEOUT_S": 2,
    "RENEW_INTERVAL_S": 1,
    "LEASE_POLL_INTERVAL_S": 0.5,
}
"""The lease's times, their order kept."""
START = f"""
import sys, threading, time
from gaudi_batch.cli import main as cli
from gaudi_batch.output import lease
from gaudi_batch.output import ledger
vars(lease).update({QUICK!r})
ledger.MANIFEST_TIMEOUT_S = lease.MANIFEST_TIMEOUT_S
take = lease.LeaseKeeper.take
def watched(keeper, *arguments):
    take(keeper, *arguments)
    threading.Thread(target=watch, args=(keeper,), daemon=True).start()
def watch(keeper):
    while keeper.holds():
        time.sleep(0.05)
    print("it holds nothing", file=sys.stderr, flush=True)
lease.LeaseKeeper.take = watched
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as started:
        yield started


def start(prompts: Path, url: str, cluster: str, options: dict[str, Any], *flags: str) -> subprocess.Popen[str]:
    """Starts a driver."""
    job = ("--device", "simulated", "--address", cluster, "--cards", "2", "--shard-size", "8", *flags)
    storage = ("--storage-options", json.dumps(options), "--simulated.batch-seconds", "0.3")
    command = [sys.executable, "-c", START, "run", "--prompts", str(prompts), "--output", url, *job, *storage]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def cut_off_when_it_commits(proxy: FaultProxy, commits: int) -> None:
    """Waits until a driver has committed so often, and lets nothing through from its next try on."""
    wait_until(lambda: proxy.asked("PUT .*/manifest/") >= commits)
    first = proxy.add(Fault("reset", "PUT", "/manifest/"))
    proxy.add(Fault("reset", when=lambda: first.hits > 0))
    wait_until(lambda: first.hits)


def as_on_another_machine(output: Storage) -> None:
    lease = json.loads(output.get("lease.json") or b"")
    output.put("lease.json", json.dumps(lease | {"machine": "another"}).encode())


def manifests(output: Storage) -> dict[str, bytes | None]:
    return {name: output.get(f"manifest/{name}") for name in output.names("manifest")}


def require_every_image_once(output: Storage) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(output.get("manifest.parquet") or b"")).to_pylist()
    assert sorted(row["row"] for row in rows) == list(range(100))
    for name, data in manifests(output).items():
        for row in pq.read_table(io.BytesIO(data or b"")).to_pylist():
            image = output.get(row["path"])
            assert image is not None, f"{name} names {row['path']}, which is gone"
            assert hashlib.sha256(image).hexdigest() == row["sha256"]
    return rows


@pytest.mark.parametrize("flags", [(), pytest.param(("--overwrite", "--seed", "2"), marks=pytest.mark.thorough)])
def test_a_driver_that_was_cut_off_changes_nothing_of_the_run_that_another_took_over(
    flags: tuple[str, ...], prompts: Path, cluster: str, s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    url = f"s3://bucket/{tmp_path.name}-{len(flags)}"
    output = Storage(url, s3.options)
    cut_off = start(prompts, url, cluster, s3.options_at(proxy.port))
    cut_off_when_it_commits(proxy, 3)
    as_on_another_machine(output)
    other = start(prompts, url, cluster, s3.options, *flags)
    log = other.communicate(timeout=120)[1]
    assert other.returncode == 0, log
    assert f"waiting up to {QUICK['LEASE_TTL_S']} s" in log
    seeds = {row["seed"] for row in require_every_image_once(output)}
    before = manifests(output)
    records = {name: output.get(name) for name in ("run.json", "manifest.parquet", "summary.json", "progress.json")}
    proxy.clear()
    log = cut_off.communicate(timeout=60)[1]
    assert cut_off.returncode == 1, log
    assert "drives this run now" in log
    assert manifests(output) == before
    assert {name: output.get(name) for name in records} == records
    assert {row["seed"] for row in require_every_image_once(output)} == seeds


@pytest.mark.thorough
def test_a_driver_that_was_cut_off_for_a_moment_goes_on(
    prompts: Path, cluster: str, s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    driver = start(prompts, url, cluster, s3.options_at(proxy.port))
    cut_off_when_it_commits(proxy, 3)
    assert follow(driver, "^it holds nothing$")
    proxy.clear()
    log = driver.communicate(timeout=120)[1]
    assert driver.returncode == 0, log
    require_every_image_once(Storage(url, s3.options))
