"""The whole job on Google Cloud Storage and Azure, whose servers and network fail as S3's do."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faultproxy import Fault, FaultProxy, fault_proxy
from helpers import StoreServer, wait_until
from smalljob import Content, a_job, content, nothing_was_held_against_cards, run, said_once, write_dataset

from gaudi_batch.cluster.connection import attached
from gaudi_batch.errors import StorageError
from gaudi_batch.storage import retry
from gaudi_batch.storage.store import Storage

pytestmark = pytest.mark.usefixtures("thread_cards")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompts")
    write_dataset(directory)
    return directory


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Content]:
    """What the job makes where nothing breaks; this process stays connected to the cluster."""
    output = tmp_path_factory.mktemp("undisturbed")
    with attached(cluster):
        assert run(dataset, output) == 3
        yield content(Storage(str(output)))


GCS_AND_THOROUGHLY_AZURE = ["gcs", pytest.param("azure", marks=pytest.mark.thorough)]


@pytest.fixture(params=["gcs", "azure"], scope="module")
def server(request: pytest.FixtureRequest) -> StoreServer:
    store: StoreServer = request.getfixturevalue(request.param)
    return store


@pytest.fixture(scope="module")
def proxy(server: StoreServer) -> Iterator[FaultProxy]:
    with fault_proxy(server.port) as started:
        yield started


@pytest.fixture
def url(server: StoreServer, tmp_path: Path) -> str:
    return server.url(tmp_path.name)


@pytest.fixture
def output(url: str, server: StoreServer) -> Storage:
    """As somebody else sees it."""
    return Storage(url, server.options)


@pytest.fixture(autouse=True)
def fresh(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.1)
    proxy.clear()
    yield
    proxy.clear()


@pytest.mark.parametrize("server", GCS_AND_THOROUGHLY_AZURE, indirect=True)
def test_a_killed_driver_s_run_is_finished(
    dataset: Path, server: StoreServer, cluster: str, url: str, output: Storage, undisturbed: Content, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(a_job(dataset, url, storage_options=server.options, simulated={"batch_seconds": 1.0})))
    command = [sys.executable, "-m", "gaudi_batch", "run", str(job), "--address", cluster]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: len(output.names("manifest")) >= 2 or driver.poll() is not None, 120)
    assert driver.poll() is None, driver.communicate()[1]
    before = output.names("manifest")
    driver.kill()
    driver.communicate()
    whole = {name: output.get(f"manifest/{name}") for name in before}
    assert run(dataset, url, storage_options=server.options) == 3
    assert content(output) == undisturbed
    assert {name: output.get(f"manifest/{name}") for name in before} == whole
    assert run(dataset, url, storage_options=server.options) == 3


@pytest.mark.parametrize("server", GCS_AND_THOROUGHLY_AZURE, indirect=True)
@pytest.mark.thorough
def test_the_job_waits_for_a_store_that_fails_for_a_while(
    dataset: Path, server: StoreServer, proxy: FaultProxy, url: str, output: Storage, undisturbed: Content
) -> None:
    options = server.quick_options_at(proxy.port)
    # Azure's library gives a listing that stalls a minute.
    objects = "(run.json|plan.parquet|manifest(/|%2F)[0-9]+.parquet|lease.json)([?]|$)"
    writes = [proxy.add(Fault(kind, "PUT|POST", every=3, count=1)) for kind in ("503", "429", "lost answer", "stall")]
    reads = [proxy.add(Fault(kind, "GET", objects, every=3, count=1)) for kind in ("500", "reset", "cut", "stall")]
    reads.append(proxy.add(Fault("503", "GET", "prefix=", count=1)))
    assert run(dataset, url, storage_options=options) == 3
    assert [fault.kind for fault in [*writes, *reads] if not fault.hits] == []
    assert content(output) == undisturbed
    nothing_was_held_against_cards(output)


@pytest.mark.parametrize("method", [pytest.param("GET", marks=pytest.mark.thorough), "PUT|POST"])
@pytest.mark.parametrize("server", GCS_AND_THOROUGHLY_AZURE, indirect=True)
def test_what_the_store_forbids_ends_the_run_at_once(
    method: str,
    dataset: Path,
    server: StoreServer,
    proxy: FaultProxy,
    url: str,
    output: Storage,
    undisturbed: Content,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = server.quick_options_at(proxy.port)

    def under_way() -> bool:
        return len(output.names("manifest")) > 1

    fault = proxy.add(Fault("403", method, when=under_way, code="AuthorizationFailure", message="Not any more."))
    # Slow enough that some shards are not made yet when the store begins to refuse.
    slow = {"batch_seconds": 0.5}
    assert run(dataset, url, storage_options=options, storage_patience=20, simulated=slow) == 1
    assert fault.hits
    line = said_once(capsys, "Not any more.", "the same command resumes")
    assert "tried for" not in line
    assert [record for record in caplog.records if record.name.startswith(("gcsfs", "azure"))] == []
    proxy.clear()
    assert run(dataset, url, storage_options=options) == 3
    assert content(output) == undisturbed


def without_bucket(proxy: FaultProxy, count: int | None = None, when: Callable[[], bool] = lambda: True) -> list[Fault]:
    """Answers as where the bucket (container) is not there: Google's says no more than "404"."""
    methods = ("PUT|POST", "GET|HEAD", "DELETE")
    return [proxy.add(Fault("404", method, count=count, when=when, code="ContainerNotFound")) for method in methods]


@pytest.mark.parametrize("server", GCS_AND_THOROUGHLY_AZURE, indirect=True)
def test_cards_wait_for_a_bucket_that_seems_gone_for_a_moment(
    dataset: Path, server: StoreServer, proxy: FaultProxy, url: str, output: Storage, undisturbed: Content
) -> None:
    under_way = threading.Event()  # asked of the store until it is so

    def is_under_way() -> bool:
        if not under_way.is_set() and len(output.names("manifest")) > 1:
            under_way.set()
        return under_way.is_set()

    gone = without_bucket(proxy, count=4, when=is_under_way)
    assert run(dataset, url, storage_options=server.quick_options_at(proxy.port)) == 3
    assert [fault.hits for fault in gone[:2]] == [4, 4]
    assert content(output) == undisturbed
    nothing_was_held_against_cards(output)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("action", ["get", "names", "remove", "put", "create", "get_range", "info"])
def test_a_bucket_that_is_not_there_says_nothing_of_what_is_in_it(
    action: str, known: bool, server: StoreServer, proxy: FaultProxy, url: str, output: Storage
) -> None:
    output.put("run.json", b"{}")
    storage = Storage(url, server.quick_options_at(proxy.port), retry_timeout_s=20.0)
    storage.creates = True
    assert not known or storage.get("run.json") == b"{}"
    storage.retry_timeout_s = 0.2
    actions: dict[str, Callable[[], object]] = {
        "get": lambda: storage.get("run.json"),
        "names": lambda: storage.names(""),
        "remove": lambda: storage.remove("run.json"),
        "put": lambda: storage.put("run.json", b""),
        "create": lambda: storage.put("new", b"", create=True),
        "get_range": lambda: storage.get_range("run.json", 0, 1),
        "info": lambda: storage.info("run.json"),
    }
    without_bucket(proxy)
    with pytest.raises(StorageError) as caught:
        actions[action]()
    assert caught.value.refused is not known, "it is waited for only where it has been there"
