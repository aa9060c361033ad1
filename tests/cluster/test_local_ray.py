"""A Ray that `run` starts for itself is for this machine and this user alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import REPOSITORY
from raynodes import descendants

CONNECT = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print('connected to', len(ray.nodes()))"


SAME_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_py_gcs_connect_timeout_s": "2"}
"""Without the first, Ray's clients look for 127.0.0.1 at the network's address; the second is their patience."""


SECRET, OTHER_SECRET = "a-secret-of-'a \"flag", "a-secret-of-the-environment"


@dataclass(frozen=True)
class LocalRun:
    """A run that goes on, on a Ray that it has started."""

    process: int
    home: Path
    environment: dict[str, str]

    @property
    def processes(self) -> frozenset[int]:
        """All that it has started, and itself."""
        return frozenset(descendants(self.process))

    @property
    def ports(self) -> dict[int, str]:
        """Every port that one of its processes listens on, with the address in hexadecimal digits."""
        sockets = set()
        for process in self.processes:
            with contextlib.suppress(OSError):
                sockets |= {str(path.readlink()) for path in Path(f"/proc/{process}/fd").iterdir()}
        addresses = {}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].partition(":")
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    addresses[int(port, 16)] = address
        return addresses

    @property
    def commands(self) -> dict[int, str]:
        """Their command lines."""
        command_lines = {}
        for process in self.processes:
            with contextlib.suppress(OSError):
                command_lines[process] = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
        return command_lines

    def connect(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Has another process of this machine join its cluster."""
        address = re.search(r"--gcs-address=(\S+)", " ".join(self.commands.values()))
        assert address
        return subprocess.run(
            [sys.executable, "-c", CONNECT, address[1]],
            env=self.environment | SAME_MACHINE | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="module")
def local_run() -> Iterator[LocalRun]:
    """A run in a home of its own, without anything set that has to do with Ray."""
    with tempfile.TemporaryDirectory(prefix="home-", ignore_cleanup_errors=True) as home:  # Ray's sockets want it short
        yield from run_in(Path(home))


def run_in(home: Path) -> Iterator[LocalRun]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["p"] * 10_000}), home / "prompts.parquet")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_TMPDIR": str(home), "AWS_SECRET_ACCESS_KEY": OTHER_SECRET}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gaudi_batch", "run", "--prompts", home / "prompts.parquet"),
            *("--output", home / "out", "--device", "simulated", "--cards", "1"),
            *("--prompts-storage-options.password", SECRET),
        ],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if " is ready after " in line and "card" in line and "Ray" not in line:
                break
        yield LocalRun(process.pid, home, environment)
    finally:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        process.wait(60)
        process.stderr.close()


def test_nothing_of_it_listens_to_the_network(local_run: LocalRun) -> None:
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    assert len(local_run.ports) > 3
    assert [address for address in local_run.ports.values() if address not in loopback] == []


def test_it_has_no_dashboard(local_run: LocalRun) -> None:
    assert 8265 not in local_run.ports
    dashboards = [command for command in local_run.commands.values() if "/dashboard.py " in command]
    assert dashboards, "what stands in its place is one, too"
    assert all("--minimal" in command or "--modules-to-load=UsageStatsHead" in command for command in dashboards)


def test_a_client_without_its_token_is_refused(local_run: LocalRun, tmp_path: Path) -> None:
    none: dict[str, str] = {"HOME": str(tmp_path)}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    # Side by side, since Ray's client tries for twenty seconds.
    with ThreadPoolExecutor() as pool:
        for refused in pool.map(lambda env: local_run.connect(**env), [none | {"RAY_AUTH_MODE": "disabled"}, wrong]):
            assert refused.returncode != 0
            assert "connected" not in refused.stdout


def test_its_secrets_are_in_no_file_and_no_command_line(local_run: LocalRun) -> None:
    logs = [path for path in local_run.home.rglob("*") if path.is_file()]
    assert len([path for path in logs if "session_" in str(path)]) > 5
    for secret in (SECRET, OTHER_SECRET):
        assert [path for path in logs if secret.encode() in path.read_bytes()] == []
        assert [command for command in local_run.commands.values() if secret in command] == []


def test_its_user_may_read_it(local_run: LocalRun) -> None:
    assert local_run.connect(RAY_AUTH_MODE="token").stdout == "connected to 1\n"


def test_nothing_in_the_package_turns_tokens_off() -> None:
    package = REPOSITORY / "gaudi_batch"
    code = "".join(path.read_text() for path in package.rglob("*.py"))
    assert re.findall(r'environ\W+(?:setdefault\W+)?RAY_AUTH_MODE\W+(\w+)"', code) == ["token"]


def test_the_lowest_ray_that_is_taken_asks_for_a_token_by_itself() -> None:
    """In 2.60 `ray.init` turns tokens on for a cluster that it starts; in 2.52 it did not."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    lowest = re.search(r'"ray\[default\]>=(\d+)\.(\d+)', project)
    assert lowest
    assert (int(lowest[1]), int(lowest[2])) >= (2, 60)
