"""Nodes of a Ray cluster as `ray start` makes them: processes of their own, which can be killed like a machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import free_port, worker_ports

RAY = str(Path(sys.executable).parent / "ray")
QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""How soon Ray takes a node that does not answer for dead; by its own settings after half a minute."""
FRUGAL = {"prestart_worker_first_driver": False, "enable_metrics_collection": False}
"""Has no node start processes for tasks that no test has, each of which costs as much as a card's, nor gather metrics,
which costs an idle cluster a third of its CPU seconds."""
REPORTS_LATE = {"REPORTER_UPDATE_INTERVAL_MS": "3600000"}
"""Has no node look at its processes every 5 s for a dashboard that nobody opens."""
BARE_RAY = """
from ray._private import utils
utils.get_dashboard_dependency_error = utils.get_ray_client_dependency_error = lambda: ImportError("left out")
from ray.scripts.scripts import main
main()
"""
"""`ray` as it is without the extras `default` and `client`, whose processes no test but those of the jobs needs."""
START_TIMEOUT_S = 150.0


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                pids += descendants(int(child))
    return pids


def session_of(pid: int) -> int:
    """The session that a process is in; 0 if there is no such process."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    return 0


@dataclass
class RayNode:
    """One node.

    Args:
        home: where it logs.
        options: of `ray start`.
        wrapper: a command that runs it.
        environment: beside this process's.
        ray: the command `ray`.
    """

    home: Path
    options: Sequence[str]
    wrapper: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)
    ray: Sequence[str] = (sys.executable, "-c", BARE_RAY)
    process: subprocess.Popen[bytes] | None = None
    killed: bool = False

    def start(self) -> RayNode:
        """Starts it and waits until it runs."""
        self.home.mkdir(parents=True, exist_ok=True)
        small = ["--object-store-memory", str(100 * 1024**2), "--disable-usage-stats", "--block"]
        with (self.home / "ray.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.wrapper, *self.ray, "start", *small, *self.options],
                # As from an activated environment: jobs find their Python on the node's path.
                env=os.environ | REPORTS_LATE | {"PATH": f"{Path(RAY).parent}:{os.environ['PATH']}"} | self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + START_TIMEOUT_S
        while b"Ray runtime started" not in (log_text := (self.home / "ray.log").read_bytes()):
            if time.monotonic() > until or self.process.poll() is not None:
                raise TimeoutError(f"a node does not start: {log_text[-2000:].decode()}")
            time.sleep(0.1)
        return self

    def processes(self) -> list[int]:
        """All that runs on it, also what has lost its parent: a node is one session."""
        assert self.process is not None
        pids = sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
        return [pid for pid in pids if session_of(pid) == self.process.pid]

    def kill(self) -> None:
        """Ends it with SIGKILL and all that runs on it, as when a machine loses its power."""
        if self.killed:
            return  # its number may be another process's by now
        assert self.process is not None
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.killed = True


@dataclass
class RayCluster:
    """A head, and nodes that join it.

    Args:
        home: where all of it logs.
        head_options: of `ray start` for the head; by default one without cards.
    """

    home: Path
    head_options: Sequence[str] = ("--num-cpus", "0")
    dashboard: bool = False
    system_config: dict[str, Any] = field(default_factory=lambda: QUICK)
    head_environment: dict[str, str] = field(default_factory=dict)
    nodes: list[RayNode] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    session: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="ray-"))
    """Ray's own files, its sockets among them, whose paths must be short."""
    asked: subprocess.Popen[str] | None = None
    """The process that asks the head for its nodes, again and again: Ray is slow to import."""

    @property
    def address(self) -> str:
        """Where drivers connect to."""
        return f"127.0.0.1:{self.port}"

    @property
    def jobs_address(self) -> str:
        """Where jobs are submitted to."""
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start(self) -> RayCluster:
        """Starts the head and waits until it runs."""
        board = [f"--include-dashboard={str(self.dashboard).lower()}", "--dashboard-port", str(self.dashboard_port)]
        options = ["--head", "--port", str(self.port), *board, "--temp-dir", self.session]
        if self.dashboard:
            options += ["--ray-client-server-port", str(free_port())]
        if "--autoscaling-config" not in self.head_options:
            options.append("--no-monitor")  # which is the autoscaler
        options += ["--system-config", json.dumps(FRUGAL | self.system_config), *self.head_options]
        # Else each dashboard and each autoscaler of this machine would have its metrics at one port.
        metrics = {f"{name}_METRIC_PORT": str(free_port()) for name in ("DASHBOARD", "AUTOSCALER")}
        self.add(*options, **metrics, **self.head_environment)
        return self

    def add(self, *options: str, wrapper: Sequence[str] = (), **environment: str) -> RayNode:
        """Starts a node; one without --head joins the head."""
        join = [] if "--head" in options else ["--address", self.address]
        ports = [f"--{name}-port={free_port()}" for name in ("dashboard-agent-listen", "dashboard-agent-grpc")]
        ports.append(f"--worker-port-list={','.join(map(str, worker_ports()))}")
        home = self.home / f"node-{len(self.nodes)}"
        # What copies the workers' logs to drivers that want none costs as much as a card's start.
        node = RayNode(home, [*join, *ports, "--include-log-monitor=false", *options], wrapper, environment)
        if self.dashboard:
            node.ray = (RAY,)
        self.nodes.append(node)
        # One after the other: at the same moment two nodes of a machine choose the same names for their sockets.
        return node.start()

    def wait_for(self, nodes: int) -> None:
        """Waits until so many nodes are up."""
        until = time.monotonic() + START_TIMEOUT_S
        while len(self.alive()) < nodes:
            if time.monotonic() > until:
                raise TimeoutError(f"{len(self.alive())} of {nodes} nodes are up; see {self.home}")
            time.sleep(0.3)

    def alive(self) -> list[dict[str, Any]]:
        """The nodes that are up, as `ray.nodes()` has them; none while the head does not answer."""
        if self.asked is None or self.asked.poll() is not None:
            self._ask_no_more()
            command = [sys.executable, "-c", _NODES, self.address]
            self.asked = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        assert self.asked.stdin is not None
        assert self.asked.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.asked.stdin.write("\n")
            self.asked.stdin.flush()
        return [node for node in json.loads(self.asked.stdout.readline() or "[]") if node["Alive"]]

    def _ask_no_more(self) -> None:
        if self.asked is not None:
            self.asked.kill()
            self.asked.communicate()

    def remove_nodes(self) -> None:
        """Ends all nodes but the head."""
        for node in self.nodes[1:]:
            node.kill()
        until = time.monotonic() + START_TIMEOUT_S
        while len(self.alive()) > 1:
            if time.monotonic() > until:
                raise TimeoutError(f"nodes that were killed are still up; see {self.home}")
            time.sleep(0.3)

    def stop(self) -> None:
        """Ends all nodes, the head last."""
        self._ask_no_more()
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.session, ignore_errors=True)


class FreeCards:
    """Asks a cluster how many of its cards nobody has.

    Args:
        address: of its head.
    """

    def __init__(self, address: str) -> None:
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions  # type: ignore[attr-defined]  # it is Cython's

        self._state = GlobalState()
        self._state._initialize_global_state(GcsClientOptions.create(address, None, True, False))

    def wait_for(self, count: int) -> None:
        """Waits until so many are free: those of a job that has ended are so a moment later."""
        until = time.monotonic() + START_TIMEOUT_S
        while (free := self._count()) < count:
            if time.monotonic() > until:
                raise TimeoutError(f"{free} of {count} cards are free")
            time.sleep(0.05)

    def _count(self) -> int:
        nodes = self._state.available_resources_per_node()
        return int(sum(resources.get("HPU", 0) for resources in nodes.values()))


def add_cards(cluster: RayCluster, cards: int, **options: Any) -> RayNode:
    """Adds a node with so many cards; `options` are those of `RayCluster.add`."""
    return cluster.add("--num-cpus=1", f'--resources={{"HPU": {cards}}}', **options)


def wait_for_card(node: RayNode) -> int:
    """The process of a node's card, once it is there."""
    assert node.process is not None
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        for pid in descendants(node.process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Card"):
                    return pid
        time.sleep(0.05)
    raise TimeoutError("no card")


def start_job(
    cluster: str, prompts: Path, output: Path, *flags: str, wrapper: Sequence[str] = (), **environment: str
) -> subprocess.Popen[str]:
    """Starts a job on a cluster."""
    command = ("run", "--address", cluster, "--prompts", prompts, "--output", output, "--shard-size", "8", *flags)
    return subprocess.Popen(
        [*wrapper, sys.executable, "-m", "gaudi_batch", *map(str, command)],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def follow(driver: subprocess.Popen[str], *marks: str) -> str:
    """Reads a job's log up to a line with one of the marks, which it returns; empty if there is none."""
    assert driver.stderr is not None
    return next((line for line in driver.stderr if any(re.search(mark, line) for mark in marks)), "")


_NODES = """
import json, sys, ray
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
state = GlobalState()
state._initialize_global_state(GcsClientOptions.create(sys.argv[1], None, True, False))
for _ in sys.stdin:
    print(json.dumps(state.node_table()), flush=True)
"""
