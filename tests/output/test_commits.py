"""Nothing that is committed is written over in object storage, and nothing that can be committed is not."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from faultproxy import Fault, FaultProxy, fault_proxy
from helpers import StoreServer, wait_until

from gaudi_batch.errors import StorageError
from gaudi_batch.layout import manifest_path
from gaudi_batch.output import holder, lease, ledger, manifest
from gaudi_batch.output.cleanup import clear
from gaudi_batch.output.holder import read_lease
from gaudi_batch.output.lease import LeaseKeeper, LeaseLost
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.throughput import ThroughputTotals
from gaudi_batch.storage import retry
from gaudi_batch.storage.store import Storage

CREATING = ["moto", "gcs", "azure"]
"""Servers that create conditionally; JuiceFS's S3 does not."""

TAKE_TIMEOUT_S = lease.TAKE_TIMEOUT_S
"""As users have it; tests have longer."""


@pytest.fixture
def server(request: pytest.FixtureRequest) -> StoreServer:
    store: StoreServer = request.getfixturevalue(request.param)
    return store


@pytest.fixture
def proxy(server: StoreServer) -> Iterator[FaultProxy]:
    with fault_proxy(server.port) as started:
        yield started


@pytest.fixture
def output(server: StoreServer, tmp_path: Path) -> Storage:
    """As somebody else sees it."""
    return Storage(server.url(tmp_path.name), server.options)


@pytest.fixture
def driver(server: StoreServer, proxy: FaultProxy, output: Storage, monkeypatch: pytest.MonkeyPatch) -> LeaseKeeper:
    """A driver that has the lease, writes it no more by itself, and reaches its storage by the proxy."""
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.1)
    for name in ("SETTLE_INTERVAL_S", "REREAD_INTERVAL_S"):
        monkeypatch.setattr(lease, name, 0.0)
    monkeypatch.setattr(lease, "RENEW_INTERVAL_S", 600.0)
    keeper = LeaseKeeper(Storage(output.url, server.quick_options_at(proxy.port), retry_timeout_s=10.0), "aaaaa")
    keeper.take()
    return keeper


def a_manifest(shard: int, attempt: str, size: int = 0) -> tuple[CommitInfo, bytes]:
    info = CommitInfo(shard, attempt, "card", "node", None, 0, 0, 0, ThroughputTotals())
    data = manifest.build([], pa.table({}), {}, {}, 0, info)
    return info, data[:4] + bytes(size) + data[4:]  # a file without rows is whole whatever is in its midst


@pytest.mark.parametrize("server", CREATING, indirect=True)
def test_a_manifest_that_arrives_late_takes_no_other_s_place(
    proxy: FaultProxy, output: Storage, driver: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network held it for so long that it was given up, and another driver committed."""
    monkeypatch.setattr(ledger, "MANIFEST_TIMEOUT_S", 0.5)
    fault = proxy.add(Fault("late", "PUT|POST", count=1))
    driver._storage.retry_timeout_s = 0.0
    with pytest.raises(StorageError, match="can't write manifest/000003"):
        Ledger(driver._storage, driver).commit(*a_manifest(3, "aaaaa1"))
    driver._storage.retry_timeout_s = 10.0
    other, data = a_manifest(3, "bbbbb1")
    output.put(manifest_path(3), data)
    proxy.clear()
    assert fault.over.wait(60)
    assert output.get(manifest_path(3)) == data
    assert Ledger(driver._storage, driver).commit(*a_manifest(3, "aaaaa2")) is False
    assert Ledger(driver._storage, driver).commit(other, data) is True


@pytest.mark.parametrize("server", [*CREATING, "s3"], indirect=True)
def test_a_manifest_whose_answer_was_lost_is_committed(
    server: StoreServer, proxy: FaultProxy, output: Storage, driver: LeaseKeeper
) -> None:
    """Whether the store's library puts it again or this package does, it finds its own."""
    for shard, options in enumerate([server.options_at(proxy.port), server.quick_options_at(proxy.port)]):
        storage = Storage(output.url, options, retry_timeout_s=10.0)
        storage.creates = driver._storage.creates
        fault = proxy.add(Fault("lost answer", "PUT|POST", count=1))
        info, data = a_manifest(shard, f"aaaaa{shard}")
        assert Ledger(storage, driver).commit(info, data) is True
        assert fault.hits == 1
        assert output.get(manifest_path(shard)) == data


@pytest.mark.parametrize("server", [*CREATING, "s3"], indirect=True)
def test_a_torn_manifest_in_object_storage_is_no_commit(output: Storage, driver: LeaseKeeper) -> None:
    info, data = a_manifest(3, "aaaaa1")
    output.put(manifest_path(3), data[:100])
    assert Ledger(driver._storage, driver).commit(info, data) is True
    assert output.get(manifest_path(3)) == data


@pytest.mark.parametrize("server", ["moto"], indirect=True)
def test_a_torn_manifest_that_another_has_replaced_is_not_removed(
    proxy: FaultProxy, output: Storage, driver: LeaseKeeper
) -> None:
    """The first try at removing it failed, and then it was whole."""
    _, data = a_manifest(3, "bbbbb1")
    output.put(manifest_path(3), data[:100])

    def replaced() -> bool:
        output.put(manifest_path(3), data)
        return True

    fault = proxy.add(Fault("503", "DELETE", "/manifest/", count=1, when=replaced))
    assert Ledger(driver._storage, driver).commit(*a_manifest(3, "aaaaa1")) is False
    assert fault.hits == 1
    assert output.get(manifest_path(3)) == data


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_nothing_is_removed_once_another_drives(proxy: FaultProxy, output: Storage, driver: LeaseKeeper) -> None:
    """The first try at it failed, and then the run was another's."""
    _, data = a_manifest(3, "bbbbb1")
    output.put(manifest_path(3), data)

    def taken_over() -> bool:
        held = json.loads(output.get("lease.json") or b"")
        output.put("lease.json", json.dumps(held | {"driver": "bbbbb"}).encode())
        return True

    fault = proxy.add(Fault("503", "DELETE", "/manifest/", count=1, when=taken_over))
    with pytest.raises(LeaseLost):
        clear(Ledger(driver._storage, driver))
    assert fault.hits == 1
    assert output.get(manifest_path(3)) == data


@pytest.mark.parametrize("server", [*CREATING, "s3"], indirect=True)
def test_whether_a_store_creates_conditionally_is_found_out(
    server: StoreServer, output: Storage, driver: LeaseKeeper, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gaudi_batch")
    driver._storage.find_out_create("lease.json", driver._data())
    assert ("the lease alone guards what is committed" in caplog.text) is not driver._storage.creates
    assert driver._storage.creates is (type(server).__name__ != "S3Server")
    assert output.names("") == ["lease.json"]
    held = read_lease(output)
    assert held is not None
    assert held.driver == "aaaaa"
    storage = driver._storage
    storage.put("x", b"1", create=True)
    if storage.creates:
        with pytest.raises(FileExistsError):
            storage.put("x", b"2", create=True)
    else:
        storage.put("x", b"2", create=True)
    assert output.get("x") == (b"1" if storage.creates else b"2")


@pytest.mark.parametrize("server", ["s3"], indirect=True)
@pytest.mark.parametrize(("status", "code"), [("501", "NotImplemented"), ("400", "InvalidArgument")])
def test_a_store_that_knows_no_conditions_is_used_without(
    status: str,
    code: str,
    server: StoreServer,
    proxy: FaultProxy,
    output: Storage,
    driver: LeaseKeeper,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver.release()
    caplog.set_level("INFO", "gaudi_batch")
    fault = proxy.add(Fault(status, "PUT", "/lease.json", every=2, count=1, code=code))  # the second one is conditional
    keeper = LeaseKeeper(Storage(output.url, server.quick_options_at(proxy.port), retry_timeout_s=10.0), "bbbbb")
    keeper.take()
    assert fault.hits == 1
    assert Ledger(keeper._storage, keeper).commit(*a_manifest(3, "bbbbb1")) is True
    assert keeper._storage.creates is False
    lines = [record.message for record in caplog.records if "the lease alone guards" in record.message]
    assert ["Made by the proxy." in line for line in lines] == [True]


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_a_bucket_that_seems_gone_for_a_moment_ends_no_hold(proxy: FaultProxy, driver: LeaseKeeper) -> None:
    fault = proxy.add(Fault("404", "GET", "/lease.json", count=2, code="NoSuchBucket"))
    assert held(driver)
    assert fault.hits == 2


def held(driver: LeaseKeeper) -> bool:
    try:
        driver.ensure_held()
    except StorageError:
        return False
    return True


@pytest.mark.parametrize("server", ["moto", "s3"], indirect=True)
def test_a_manifest_that_takes_long_to_write_is_committed(
    server: StoreServer, proxy: FaultProxy, output: Storage, driver: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MANIFEST_TIMEOUT_S", 0.5)
    storage = Storage(output.url, server.options_at(proxy.port), retry_timeout_s=0.0)
    fault = proxy.add(Fault("slow", "PUT", "/manifest/"))
    info, data = a_manifest(3, "aaaaa1", size=10_000_000)
    assert committed(lambda: Ledger(storage, driver).commit(info, data))
    assert fault.hits == 1
    assert output.get(manifest_path(3)) == data


def committed(commit: Callable[[], bool]) -> bool:
    try:
        return commit()
    except StorageError:
        return False


@pytest.mark.parametrize("server", ["s3"], indirect=True)
def test_a_manifest_on_its_way_is_given_up_when_the_lease_can_t_be_kept_up(
    proxy: FaultProxy, output: Storage, driver: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MANIFEST_TIMEOUT_S", 600.0)
    monkeypatch.setattr(retry, "KEEP_INTERVAL_S", 0.1)
    given_up = threading.Event()

    def commit() -> None:
        with pytest.raises(StorageError, match="the lease can't be kept up"):
            Ledger(driver._storage, driver).commit(*a_manifest(3, "aaaaa1"))
        given_up.set()

    driver._storage.retry_timeout_s = 5.0
    fault = proxy.add(Fault("deaf", "PUT", "/manifest/"))
    threading.Thread(target=commit, daemon=True).start()
    wait_until(lambda: fault.hits)
    assert not given_up.is_set()
    monkeypatch.setattr(lease, "RENEW_DEADLINE_S", 0.0)
    assert given_up.wait(60)


def test_a_holder_lets_go_before_another_may_take_over() -> None:
    """What the network still has of a write that was given up may take as long as one try at the lease."""
    assert lease.RENEW_DEADLINE_S + retry.KEEP_INTERVAL_S + lease.LEASE_TIMEOUT_S < holder.LEASE_TTL_S
    assert TAKE_TIMEOUT_S + retry.KEEP_INTERVAL_S < lease.SETTLE_INTERVAL_S
    assert lease.RENEW_INTERVAL_S + 2 * lease.LEASE_TIMEOUT_S <= lease.RENEW_DEADLINE_S, "one slow beat ends no commit"
