"""Storage fails in every way that it does in life, before real servers and real disks; each run ends as if it had not.

One undisturbed run is the measure: a disturbed one has the same manifest in the end, or stops with a clear reason and
has it when started again.
"""

from __future__ import annotations

import datetime
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from faultproxy import Fault, FaultProxy, fault_proxy
from gcsfs import GCSFileSystem
from helpers import S3Server, StoreServer, wait_until
from s3fs import S3FileSystem
from smalljob import SHARDS, Content, content, nothing_was_held_against_cards, run, said_once, write_dataset

from gaudi_batch.cluster.connection import attached
from gaudi_batch.driver.places import Places
from gaudi_batch.errors import StorageError
from gaudi_batch.output import lease
from gaudi_batch.output.holder import read_lease
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.reporting.status import read_status
from gaudi_batch.storage import reading as storage_module
from gaudi_batch.storage import retry, retrying, waits
from gaudi_batch.storage.filesystem import search_credentials_again
from gaudi_batch.storage.store import Storage

pytestmark = pytest.mark.usefixtures("thread_cards")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompts")
    write_dataset(directory)
    return directory


@pytest.fixture(scope="module")
def ray_here(cluster: str) -> Iterator[None]:
    """This process stays connected, so that each run needs not connect anew."""
    with attached(cluster):
        yield


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What the job makes where nothing breaks."""
    output = tmp_path_factory.mktemp("undisturbed")
    assert run(dataset, output) == 3
    return content(Storage(str(output)))


@pytest.fixture(scope="module")
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.port) as started:
        yield started


@pytest.fixture(autouse=True)
def fresh(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.1)
    proxy.clear()
    yield
    proxy.clear()


def options(s3: S3Server, proxy: FaultProxy) -> dict[str, Any]:
    return s3.quick_options_at(proxy.port)


@pytest.mark.parametrize(
    "kind",
    ["503", "lost answer", "stall", *(pytest.param(k, marks=pytest.mark.thorough) for k in ("500", "reset", "cut"))],
)
def test_cards_wait_for_an_output_that_fails_for_a_while(
    kind: str, dataset: Path, s3: S3Server, proxy: FaultProxy, tmp_path: Path, undisturbed: Content
) -> None:
    places = [("PUT", "/images/"), ("PUT", "/manifest/"), ("GET", "/manifest/"), ("GET", "prefix=[^&]*manifest")]
    places += [("PUT", "/run.json"), ("PUT", "/plan.parquet"), ("PUT", "/throughput/"), ("PUT", "/manifest.parquet")]
    if kind == "cut":
        places = [("GET", "/manifest/"), ("GET", "prefix=[^&]*manifest"), ("GET", "/plan.parquet")]
    code = "SlowDown" if kind == "503" else "InternalError"
    faults = [proxy.add(Fault(kind, method, path, count=2, code=code)) for method, path in places]
    output = Storage(f"s3://bucket/{tmp_path.name}", s3.options)
    assert run(dataset, f"s3://bucket/{tmp_path.name}", storage_options=options(s3, proxy)) == 3
    if kind == "cut":
        run(dataset, f"s3://bucket/{tmp_path.name}", storage_options=options(s3, proxy))
    assert [fault.hits for fault in faults] == [2] * len(faults)
    assert content(output) == undisturbed
    nothing_was_held_against_cards(output)


def images_sent(requests: list[str]) -> Counter[str]:
    """How often each image was sent."""
    return Counter(request for request in requests if re.match(r"PUT .*/images/.*\.png", request))


def test_cards_wait_for_a_server_that_was_killed(
    dataset: Path, s3: S3Server, proxy: FaultProxy, tmp_path: Path, undisturbed: Content
) -> None:
    done, before = threading.Event(), 0

    def is_tried_again() -> bool:
        """Some image has been sent thrice since the server is gone."""
        return max(images_sent(proxy.requests[before:]).values(), default=0) >= 3

    def kill_and_restart() -> None:
        nonlocal before
        wait_until(lambda: proxy.asked("PUT .*/manifest/") >= 2 or done.is_set())
        s3.kill()
        before = len(proxy.requests)
        try:
            wait_until(lambda: is_tried_again() or done.is_set())
        finally:
            s3.start()

    killer = threading.Thread(target=kill_and_restart)
    killer.start()
    try:
        url = f"s3://bucket/{tmp_path.name}"
        slow = {"batch_seconds": 0.3}
        assert run(dataset, url, storage_options=options(s3, proxy), simulated=slow) == 3
    finally:
        done.set()
        killer.join()
    assert is_tried_again()
    output = Storage(f"s3://bucket/{tmp_path.name}", s3.options)
    assert content(output) == undisturbed
    nothing_was_held_against_cards(output)


def test_cards_wait_for_a_bucket_that_seems_gone_for_a_moment(
    dataset: Path, s3: S3Server, proxy: FaultProxy, tmp_path: Path, undisturbed: Content
) -> None:
    """As a server may say that has just been started again."""
    url = f"s3://bucket/{tmp_path.name}"

    def under_way() -> bool:
        return proxy.asked("PUT .*/manifest/") > 1

    gone = [proxy.add(Fault("404", method, when=under_way, count=3, code="NoSuchBucket")) for method in ("PUT", "GET")]
    assert run(dataset, url, storage_options=options(s3, proxy)) == 3
    assert [fault.hits for fault in gone] == [3, 3]
    output = Storage(url, s3.options)
    assert content(output) == undisturbed
    nothing_was_held_against_cards(output)


def test_a_bucket_that_is_not_there_says_nothing_of_what_is_in_it(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    Storage(url, s3.options).put("run.json", b"{}")
    actions: list[Callable[[Storage], object]] = [
        lambda storage: storage.get("run.json"),
        lambda storage: storage.names(""),
        lambda storage: storage.remove("run.json"),
        lambda storage: storage.put("run.json", b""),
    ]
    for action in actions:
        proxy.clear()
        proxy.add(Fault("404", code="NoSuchBucket"))
        with pytest.raises(StorageError) as caught:
            action(Storage(url, options(s3, proxy)))
        assert caught.value.refused, "it has never been there"


class Roles(ThreadingHTTPServer):
    """The service that gives machines of a cloud the credentials of their role; `fails` requests get no answer."""

    fails = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Role)


class _Role(BaseHTTPRequestHandler):
    server: Roles

    def do_GET(self) -> None:
        self.server.fails -= 1
        role = {"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "k", "SecretAccessKey": "s", "Token": "t"}
        until = {"LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z"}
        body = "token" if self.command == "PUT" else json.dumps(role | until) if self.path.endswith("/it") else "it"
        self.send_response(503 if self.server.fails >= 0 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Roles]:
    S3FileSystem.clear_instance_cache()  # a copy of a Storage must not find one that has credentials
    with Roles() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, "/nonexistent")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()


def test_credentials_of_a_role_that_were_there_are_asked_for_again(
    moto: StoreServer, roles: Roles, tmp_path: Path
) -> None:
    """The service fails just when a card begins."""
    ours = {name: value for name, value in moto.options.items() if name not in ("key", "secret")}
    driver = Storage(moto.url(tmp_path.name), ours)
    driver.put("run.json", b"{}")
    roles.fails = 4
    card = pickle.loads(pickle.dumps(driver))
    assert whatever_it_takes(lambda: card.get("run.json")) == b"{}"
    assert roles.fails < 0


class GoogleRoles(ThreadingHTTPServer):
    """The same of Google; while it `fails`, it is as where there is none."""

    fails = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _GoogleRole)


class _GoogleRole(BaseHTTPRequestHandler):
    server: GoogleRoles

    def do_GET(self) -> None:
        token = {"access_token": "t", "expires_in": 3600, "token_type": "Bearer"}
        account = {"email": "default", "scopes": [], "aliases": []}
        bodies = {"token": json.dumps(token), "default": json.dumps(account), "project-id": "tests", "": ""}
        last = self.path.partition("?")[0].rstrip("/").rpartition("/")[2]
        self.send_response(404 if self.server.fails or last not in bodies else 200)
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Type", "application/json" if last in ("token", "default") else "text/plain")
        self.send_header("Content-Length", str(len(bodies.get(last, ""))))
        self.end_headers()
        self.wfile.write(bodies.get(last, "").encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def google_roles(monkeypatch: pytest.MonkeyPatch) -> Iterator[GoogleRoles]:
    GCSFileSystem.clear_instance_cache()
    with GoogleRoles() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        here = f"127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("google.auth.compute_engine._metadata._GCE_METADATA_HOST", here)
        monkeypatch.setenv("GCE_METADATA_IP", here)
        monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")
        for name in ("GOOGLE_APPLICATION_CREDENTIALS", "NO_GCE_CHECK"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()


@pytest.fixture
def closed_gcs(gcs: StoreServer) -> Iterator[dict[str, Any]]:
    """The options of a store that wants credentials, which they do not give."""
    with fault_proxy(gcs.port) as proxy:
        proxy.add(Fault("401", anonymous=True, message="Anonymous caller does not have storage.objects.get access."))
        yield {name: value for name, value in gcs.options_at(proxy.port).items() if name != "token"}


def test_a_card_that_finds_no_credentials_of_google_for_a_moment_looks_again(
    closed_gcs: dict[str, Any],
    google_roles: GoogleRoles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The service fails just when a card begins."""
    driver = Storage(f"gs://bucket/{tmp_path.name}", closed_gcs)
    driver.put("run.json", b"{}")
    google_roles.fails = True
    card = pickle.loads(pickle.dumps(driver))
    again = search_credentials_again

    def search_again(filesystem: Any) -> None:
        again(filesystem)
        google_roles.fails = False  # after the first look in vain

    monkeypatch.setattr(retrying, "search_credentials_again", search_again)
    assert whatever_it_takes(lambda: card.get("run.json")) == b"{}"
    assert not google_roles.fails


def test_credentials_of_google_that_can_not_be_renewed_for_a_moment_are_waited_for(
    closed_gcs: dict[str, Any], google_roles: GoogleRoles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its library says of them what a store says of wrong ones."""
    driver = Storage(f"gs://bucket/{tmp_path.name}", closed_gcs)
    driver.put("run.json", b"{}")
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=no_sleep))  # it tries again for half a minute
    again = search_credentials_again

    def search_again(filesystem: Any) -> None:
        again(filesystem)
        google_roles.fails = False

    monkeypatch.setattr(retrying, "search_credentials_again", search_again)
    google_roles.fails = True
    driver.filesystem.credentials.credentials.expiry = datetime.datetime(2026, 1, 1)
    assert whatever_it_takes(lambda: driver.get("run.json")) == b"{}"
    assert not google_roles.fails


async def no_sleep(seconds: float) -> None:
    pass


def test_a_store_of_google_that_is_asked_anonymously_is_said_so(
    closed_gcs: dict[str, Any],
    google_roles: GoogleRoles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    google_roles.fails = True
    storage = Storage(f"gs://bucket/{tmp_path.name}", closed_gcs)
    assert "no credentials of Google Cloud are found" in caplog.text
    with pytest.raises(StorageError, match="Anonymous caller") as caught:
        storage.get("run.json")
    assert caught.value.refused, "it never had any"
    caplog.clear()
    Storage(f"gs://bucket/{tmp_path.name}", closed_gcs | {"token": "anon"})
    assert caplog.text == ""


def test_credentials_that_are_looked_for_long_are_not_waited_for_in_silence(
    closed_gcs: dict[str, Any],
    google_roles: GoogleRoles,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waits, "FIRST_LINE_S", 0.0)
    Storage(f"gs://bucket/{tmp_path.name}", closed_gcs)
    assert "still looking for credentials" in caplog.text


def whatever_it_takes(operation: Callable[[], Any]) -> Any:
    try:
        return operation()
    except StorageError as error:
        return error


def test_credentials_are_not_waited_for_as_long_as_storage(
    moto: StoreServer, roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = {name: value for name, value in moto.options.items() if name not in ("key", "secret")}
    driver = Storage(moto.url(tmp_path.name), ours)
    driver.put("run.json", b"{}")
    roles.fails = 10**6
    with pytest.raises(StorageError, match="NoCredentialsError") as caught:
        Storage(driver.url, ours).get("run.json")
    assert caught.value.refused, "it never had any"
    monkeypatch.setattr(retrying, "CREDENTIALS_TIMEOUT_S", 0.5)
    with pytest.raises(StorageError, match=r"tried for \d+ s: NoCredentialsError") as caught:
        pickle.loads(pickle.dumps(driver)).get("run.json")
    assert not caught.value.refused


def test_storage_that_fails_a_card_as_it_starts_is_not_held_against_the_card(
    dataset: Path,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    undisturbed: Content,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card reads run.json first, and the driver no more by then."""
    url, ours = f"s3://bucket/{tmp_path.name}", options(s3, proxy)
    output = Storage(url, s3.options)
    started: list[int] = []
    start = Places.start

    def noted(places: Places, number: int) -> Any:
        started.append(number)
        return start(places, number)

    monkeypatch.setattr(Places, "start", noted)
    proxy.add(Fault("503", "GET", "/run.json", when=lambda: bool(started)))
    assert run(dataset, url, storage_options=ours, storage_patience=1) == 1
    assert "no card is left" not in said_once(capsys, "can't read run.json, tried for", "storage_patience")
    proxy.clear()
    started.clear()
    once = proxy.add(Fault("stall", "GET", "/run.json", when=lambda: bool(started), count=1))
    assert run(dataset, url, storage_options=ours, storage_patience=10) == 3
    assert once.hits == 1
    assert content(output) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for a part of the job."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_stops_the_run_and_the_same_command_finishes_it(
    dataset: Path, small_disk: Path, undisturbed: Content, capsys: pytest.CaptureFixture[str]
) -> None:
    output = small_disk / "out"
    assert run(dataset, output) == 1
    said_once(capsys, "No space left on device", "the same command resumes")
    assert not list(output.rglob("*.part-*"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert run(dataset, output) == 3
    assert content(Storage(str(output))) == undisturbed


def test_a_manifest_that_was_written_in_part_is_no_commit(dataset: Path, tmp_path: Path, undisturbed: Content) -> None:
    assert run(dataset, tmp_path / "out") == 3
    manifests = sorted((tmp_path / "out/manifest").iterdir())
    whole = {path: path.read_bytes() for path in manifests}
    broken = {manifests[1]: whole[manifests[1]][:-100], manifests[3]: b""}
    for path, data in broken.items():
        path.write_bytes(data)
    for name in ("manifest.parquet", "summary.json"):
        (tmp_path / "out" / name).unlink()
    assert run(dataset, tmp_path / "out") == 3
    assert content(Storage(str(tmp_path / "out"))) == undisturbed
    assert [path for path in manifests if path.read_bytes() != whole[path]] == list(broken)


def test_a_writer_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    script = (
        "import sys; from gaudi_batch.storage.store import Storage as S; S(sys.argv[1]).put('x/i.png', bytes(2**27))"
    )
    storage, until = Storage(str(tmp_path)), time.monotonic() + 120
    while not list(tmp_path.glob("x/*.part-*")):
        assert time.monotonic() < until, "no writer was caught amid its work"
        (tmp_path / "x/i.png").unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
        while writer.poll() is None and not any(path.stat().st_size for path in tmp_path.glob("x/*.part-*")):
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert storage.names("x") == []
    assert storage.get("x/i.png") is None


@pytest.mark.parametrize(
    ("status", "code"), [pytest.param("403", "AccessDenied", marks=pytest.mark.thorough), ("400", "ExpiredToken")]
)
def test_credentials_that_expire_stop_the_run_with_the_stores_own_words(
    status: str,
    code: str,
    dataset: Path,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    undisturbed: Content,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, ours = f"s3://bucket/{tmp_path.name}", options(s3, proxy)
    late: dict[str, Any] = {"when": lambda: proxy.asked("PUT .*/manifest/") > 1}
    proxy.add(Fault(status, code=code, message="The provided token has expired.", **late))
    assert run(dataset, url, storage_options=ours) == 1
    said_once(capsys, "The provided token has expired.", "the same command resumes")
    proxy.clear()
    assert run(dataset, url, storage_options=ours) == 3
    assert content(Storage(url, s3.options)) == undisturbed


def test_prompts_are_read_from_storage_that_fails(
    dataset: Path, s3: S3Server, proxy: FaultProxy, tmp_path: Path, undisturbed: Content
) -> None:
    prompts = Storage(f"s3://bucket/{tmp_path.name}-prompts", s3.options)
    for path in dataset.iterdir():
        prompts.put_file(path.name, str(path))
    kinds = ["500", "503", "reset", "cut", "stall"]
    planned = tmp_path / "out/run.json"
    first = [proxy.add(Fault(kind, count=1)) for kind in kinds]
    later = [proxy.add(Fault(kind, "GET", "parquet", count=2, every=2, when=planned.exists)) for kind in kinds]
    assert run(prompts.url, tmp_path / "out", prompts_storage_options=options(s3, proxy)) == 3
    assert [fault.hits for fault in first] == [1] * len(kinds)
    assert all(fault.hits for fault in later)
    output = Storage(str(tmp_path / "out"))
    assert content(output) == undisturbed
    nothing_was_held_against_cards(output)


def test_prompts_that_storage_denies_cost_no_rows(
    dataset: Path,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    undisturbed: Content,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = Storage(f"s3://bucket/{tmp_path.name}-prompts", s3.options)
    for path in dataset.iterdir():
        prompts.put_file(path.name, str(path))
    ours = options(s3, proxy)
    proxy.add(Fault("403", code="AccessDenied", message="Not any more."))
    assert run(prompts.url, tmp_path / "out", prompts_storage_options=ours) == 1
    said_once(capsys, "can't find the prompts", "Forbidden")
    for every in (1, 3):
        proxy.clear()
        output = tmp_path / f"out-{every}"
        planned = output / "run.json"
        proxy.add(Fault("403", every=every, when=planned.exists, code="AccessDenied", message="Not any more."))
        assert run(prompts.url, output, prompts_storage_options=ours) == 1
        # An answer to HEAD has no body, so the store's own words are then the status alone.
        said_once(capsys, "PermissionError", "the same command resumes")
        assert [row for row in committed_errors(output) if "prompt is" not in row] == []
    proxy.clear()
    assert run(prompts.url, output, prompts_storage_options=ours) == 3
    assert content(Storage(str(output))) == undisturbed


def committed_errors(output: Path) -> list[str]:
    tables = [pq.read_table(path, columns=["error"]) for path in output.glob("manifest/*.parquet")]
    return [error for table in tables for error in table.column("error").to_pylist() if error]


def test_a_run_that_fails_at_each_of_its_steps_takes_nothing_half_done_for_done(
    dataset: Path,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    undisturbed: Content,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, ours = f"s3://bucket/{tmp_path.name}", options(s3, proxy)
    output = Storage(url, s3.options)
    denied: dict[str, Any] = {"code": "AccessDenied", "message": "Denied by the test."}

    def all_committed() -> bool:
        return proxy.asked("PUT .*/manifest/") >= SHARDS

    before_cards: list[tuple[str, str, Callable[[], bool]]] = [
        ("PUT", "/plan.parquet", lambda: True),
        ("PUT", "/run.json", lambda: True),
    ]
    after = [("GET", "/manifest/", all_committed)]
    after += [
        (method, path, lambda: True)
        for method, path in [
            ("GET", "prefix=[^&]*manifest"),
            ("GET", "/manifest/"),
            ("PUT", "/manifest.parquet"),
            ("PUT", "/summary.json"),
        ]
    ]
    for method, path, when in [*before_cards, *after]:
        proxy.clear()
        fault = proxy.add(Fault("403", method, path, when=when, **denied))
        assert run(dataset, url, storage_options=ours) == 1, path
        assert fault.hits, path
        said_once(capsys, "Denied by the test.")
        assert output.get("summary.json") is None
        held = read_lease(output)
        assert held is None or held.released
        if output.get("run.json") is not None:
            assert read_status(OutputReader(output))["state"] == "stopped"
    proxy.clear()
    fault = proxy.add(Fault("403", "GET", "prefix=[^&]*images", **denied))
    assert run(dataset, url, storage_options=ours) == 3, "what earlier drivers have left is left"
    assert fault.hits
    assert "that were not committed is still there: " in capsys.readouterr().err
    proxy.clear()
    assert run(dataset, url, storage_options=ours) == 3
    assert proxy.asked(r"PUT .*/images/.*\.png") == 0, "made again"
    assert content(output) == undisturbed


@pytest.mark.parametrize("kind", ["503", pytest.param("stall", marks=pytest.mark.thorough)])
def test_a_run_stops_when_storage_has_failed_for_as_long_as_the_job_says(
    kind: str,
    dataset: Path,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
    undisturbed: Content,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(retrying, "END_TIMEOUT_S", 2.0)
    monkeypatch.setattr(lease, "LEASE_TIMEOUT_S", 2.0)
    url, ours = f"s3://bucket/{tmp_path.name}", options(s3, proxy)
    late: dict[str, Any] = {"when": lambda: proxy.asked("PUT .*/images/") > 16}
    fault = proxy.add(Fault(kind, code="SlowDown", message="Please reduce your request rate.", **late))
    assert run(dataset, url, storage_options=ours, storage_patience=3) == 1
    assert fault.hits
    said_once(capsys, "storage_patience", "the same command resumes")
    assert max(images_sent(proxy.requests).values()) <= 7, "seven tries have pauses of 3 s at least between them"
    proxy.clear()
    assert run(dataset, url, storage_options=ours) == 3
    assert content(Storage(url, s3.options)) == undisturbed


def test_an_upload_that_nobody_reads_is_given_up_and_tried_again(
    s3: S3Server, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "SLOWEST_BYTES_PER_S", 1e9)
    storage = Storage(f"s3://bucket/{tmp_path.name}", options(s3, proxy))
    storage.try_timeout_s = 2.0
    fault = proxy.add(Fault("deaf", "PUT", "/big", count=1))
    storage.put("big", bytes(2**24))
    assert fault.hits == 1
    assert len(storage.get("big") or b"") == 2**24


def test_an_object_that_takes_long_to_read_is_read(s3: S3Server, proxy: FaultProxy, tmp_path: Path) -> None:
    url = f"s3://bucket/{tmp_path.name}"
    Storage(url, s3.options).put("big", bytes(3_000_000))
    storage = Storage(url, options(s3, proxy), retry_timeout_s=10.0)
    storage.try_timeout_s = 0.5
    fault = proxy.add(Fault("slow", "GET", "/big"))
    assert whatever_it_takes(lambda: storage.get("big")) == bytes(3_000_000)
    assert fault.hits


def test_a_local_read_that_never_ends_is_given_up_when_storage_may_fail_no_longer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stuck")
    storage = Storage(str(tmp_path), retry_timeout_s=1.0)
    storage.try_timeout_s = 0.5
    with pytest.raises(StorageError, match=r"storage_patience\): TimeoutError: no answer"):
        storage.get("stuck")
