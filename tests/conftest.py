"""Shared by all tests: small datasets, a Ray cluster for a session, and a run of the command line."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import AzureServer, GcsServer, MotoServer, S3Server, StoreServer, examples, free_port, serving
from hypothesis import HealthCheck, settings
from raynodes import FreeCards, RayCluster

from gaudi_batch.output import holder, lease
from gaudi_batch.output.lease import LeaseKeeper

LONGEST = {
    "test_cluster.py",
    "test_bad_nodes.py",
    "test_ray_up.py",
    "test_chaos.py",
    "test_gaudi.py",
    "test_emulator.py",
}
"""Files that take minutes."""
CARDS = 4
"""Of the cluster that most tests share."""
CLUSTER = Path(__file__).resolve().parent / "cluster"

# Machines differ in speed and are shared: time says nothing about whether a property holds.
settings.register_profile(
    "repository",
    max_examples=examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repository")

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Otherwise gcsfs asks over gRPC, for a minute, what kind of bucket it is, which fake-gcs-server does not know.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# Threads of several processes that wait for each other on a busy machine take three times the CPU seconds.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs Ray, and puts the files that take long first: the short ones fill the end. Leaves out what only
    `make thorough` runs: more cases of what others show already."""
    if "THOROUGH" not in os.environ:
        left_out = [item for item in items if item.get_closest_marker("thorough")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if CLUSTER in item.path.parents or "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
    with_ray = Counter(item.path for item in items if item.get_closest_marker("ray"))
    items.sort(key=lambda item: (item.path.name not in LONGEST, -with_ray[item.path]))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Prints a failure when it happens: a session that is ended from outside prints none at its end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.fixture(autouse=True)
def leases_end_with_their_test() -> Iterator[None]:
    """Else the thread that keeps a lease up writes to its log in the midst of another test."""
    taken: list[LeaseKeeper] = []
    take = LeaseKeeper.take

    def noted(keeper: LeaseKeeper, *args: Any, **kwargs: Any) -> None:
        taken.append(keeper)
        take(keeper, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        # No two drivers of a test start at the same moment, and a loaded disk may take longer.
        patched.setattr(lease, "TAKE_TIMEOUT_S", lease.LEASE_TIMEOUT_S)
        patched.setattr(holder, "_in_doubt", set())
        patched.setattr(holder, "_ended", set())  # the drivers of many tests have the same names
        patched.setattr(LeaseKeeper, "take", noted)
        yield
        for keeper in taken:
            keeper.forget()


@pytest.fixture(autouse=True)
def the_log_is_as_an_application_finds_it() -> Iterator[None]:
    """Whatever the command line has made of it in the same process, in another test or a fixture of many."""

    def reset() -> None:
        log = logging.getLogger("gaudi_batch")
        log.handlers.clear()
        log.propagate = True
        log.setLevel(logging.NOTSET)
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(logging.WARNING)
        for name, module in logging.root.manager.loggerDict.items():
            if name.startswith("gaudi_batch.") and isinstance(module, logging.Logger):
                module.disabled = False

    reset()
    yield
    reset()


@pytest.fixture(autouse=True)
def the_hub_s_connections_end_with_their_test() -> Iterator[None]:
    """Else one that a test without hub has opened, or with other timeouts, refuses another test of the same process."""
    yield
    if http := sys.modules.get("huggingface_hub.utils._http"):
        http.configure_http_backend()


@pytest.fixture
def thread_cards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process have their cards in it, too; see threadcards.py."""
    import threadcards  # not before Ray's token is in the environment

    if request.node.get_closest_marker("processes") is None:
        threadcards.put_in_place(monkeypatch)


@pytest.fixture
def write_prompts(tmp_path: Path) -> Callable[..., Path]:
    """Writes Parquet files of prompts and returns their directory."""

    def write(*tables: pa.Table | dict[str, Any], row_group_size: int = 1000, name: str = "prompts") -> Path:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        for number, table in enumerate(tables):
            if isinstance(table, dict):
                table = pa.table(table)
            pq.write_table(table, directory / f"part-{number}.parquet", row_group_size=row_group_size)
        return directory

    return write


@pytest.fixture
def prompts(write_prompts: Callable[..., Path]) -> Path:
    """Three files of uneven size with several row groups each, 100 rows in all."""
    texts = [f"prompt number {number}" for number in range(100)]
    cuts = [(0, 7), (7, 60), (60, 100)]
    return write_prompts(
        *({"prompt": texts[a:b], "topic": [f"t{n % 3}" for n in range(a, b)]} for a, b in cuts), row_group_size=20
    )


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Ray cluster of four cards for the tests that kill nothing but their own cards; yields its address."""
    head = ("--num-cpus", "4", "--resources", f'{{"HPU": {CARDS}}}')
    started = RayCluster(tmp_path_factory.mktemp("cluster"), head, system_config={})
    try:
        yield started.start().address
    finally:
        started.stop()


@pytest.fixture
def cards_are_free(cluster: str) -> None:
    """A test that needs all cards of that cluster finds them free, whatever the job before has left to Ray to end."""
    FreeCards(cluster).wait_for(CARDS)


# Not of the session: while it idles, it takes in three minutes as many CPU seconds as a start.
@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """The head of a cluster, on which no card fits."""
    started = RayCluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield started.start()
    finally:
        started.stop()


@pytest.fixture
def nodes(head: RayCluster) -> Iterator[RayCluster]:
    """A cluster of this head and the nodes that a test adds to it."""
    try:
        yield head
    finally:
        head.remove_nodes()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A real S3 server."""
    with serving(S3Server(tmp_path_factory.mktemp("s3"), free_port())) as server:
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """One that creates conditionally."""
    with serving(MotoServer(tmp_path_factory.mktemp("moto"), free_port())) as server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A server of Google Cloud Storage."""
    with serving(GcsServer(tmp_path_factory.mktemp("gcs"), free_port())) as server:
        yield server


@pytest.fixture(scope="session")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """A server of Azure Blob Storage."""
    if not AzureServer.program.exists():
        pytest.skip("Azurite is not installed; `make test` installs it")
    with serving(AzureServer(tmp_path_factory.mktemp("azure"), free_port())) as server:
        yield server
