"""The connection to a Ray cluster, found or started, and how many cards the cluster has."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray._private.state import state

from gaudi_batch.cluster.address import check_reachable, refuse_without_stack
from gaudi_batch.cluster.tokens import what_token_lacks
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError
from gaudi_batch.job import DEFAULT_CARDS, Job
from gaudi_batch.pipelines.cpus import usable_cpus
from gaudi_batch.pipelines.gaudi_environment import environment
from gaudi_batch.scheduling.events import Capacity
from gaudi_batch.storage.retry import run_with_timeout
from gaudi_batch.text import one_line

OBJECT_STORE_BYTES = 200 * 1024**2
"""Object store of a Ray that is started here. Images never pass through it."""
VISIBLE_MODULES = "HABANA_VISIBLE_MODULES"
HL_SMI_TIMEOUT_S = 120.0
"""Seconds that hl-smi may take to list the modules of this machine."""


@dataclass(frozen=True)
class CardResources:
    """What one card takes of a cluster."""

    name: str
    """Ray's name of the resource."""
    amount: int

    @property
    def bundle(self) -> dict[str, float]:
        """The one bundle of a card's placement group."""
        return {self.name: self.amount}

    def on(self, node: dict[str, Any]) -> int:
        """How many cards a node, an entry of `ray.nodes()` that is alive, has in all."""
        return int(node["Resources"].get(self.name, 0) // self.amount)


def card_resources(job: Job) -> CardResources:
    """What a card of a job takes: an HPU, or cores for the device cpu."""
    if job.config.device != "cpu":
        return CardResources("HPU", 1)
    assert job.threads is not None
    return CardResources("CPU", job.threads)


def card_options(config: JobConfig, resources: CardResources) -> dict[str, Any]:
    """Ray's options for the actor of a card: what it takes, and the environment that it starts in."""
    amount = {resources.name: resources.amount}
    return {
        "num_cpus": amount.pop("CPU", 0),
        "resources": amount,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": environment(config)} if config.device == "hpu" else None,
    }


@contextlib.contextmanager
def connected(job: Job, address: str | None) -> Iterator[None]:
    """Connects to the cluster at `address`, or starts Ray on this machine for the time being; a Ray to which this
    process is connected already is used as it is.

    Raises:
        InputError: there is no cluster at the address, this machine can't have the job's cards, or another thread's run
            has connected this process.
    """
    if address not in (None, "local"):
        with attached(address):
            yield
        return
    with _the_connection() as connects:
        if connects:
            with _started(job):
                yield
        else:
            yield


@contextlib.contextmanager
def attached(address: str | None) -> Iterator[None]:
    """Connects to the cluster at `address`, unless this process is connected already.

    Raises:
        InputError: there is none, or another thread's run has connected this process.
    """
    with _the_connection() as connects:
        if not connects:
            yield
            return
        if address:
            check_reachable(address)
        _quieten()
        with _nothing_printed():
            try:
                # A head whose processes hang takes a connection and never answers.
                run_with_timeout(lambda: ray.init(address=address, **_QUIET), CONNECT_TIMEOUT_S)
            except Exception as error:
                raise InputError(
                    f"no Ray cluster answers at {address!r}: {one_line(error, 200)}; if it asks for a token:"
                    f" {what_token_lacks()}"
                ) from None
            try:
                yield
            finally:
                ray.shutdown()


_guard = threading.Lock()
_connects: int | None = None
"""The thread whose run connects this process; None if the application has connected it, or nobody."""


@contextlib.contextmanager
def _the_connection() -> Iterator[bool]:
    """Yields whether the caller has to connect; it has not where this process is connected already. A process has one
    connection: a run of another thread would lose it when the run that made it ends."""
    global _connects
    me = threading.get_ident()
    with _guard:
        if _connects not in (None, me):
            raise InputError(
                "another run of this process has connected it to Ray, and ends that when it is over; wait for it, use a"
                " process for each run, or call ray.init before the first, for all of them"
            )
        connects = _connects is None and not ray.is_initialized()
        if connects:
            _connects = me
    try:
        yield connects
    finally:
        if connects:
            _connects = None


@contextlib.contextmanager
def _started(job: Job) -> Iterator[None]:
    resources = card_resources(job)
    cards = DEFAULT_CARDS if job.config.cards == "all" else job.config.cards
    own: dict[str, float] | None = {} if resources.name == "CPU" else {resources.name: cards}
    if job.config.device == "hpu":
        refuse_without_stack(job.config, None)
        _name_modules()
        own = None  # Ray finds the cards by itself
    _quieten()
    with _on_loopback():
        try:
            ray.init(
                address="local",
                num_cpus=max(usable_cpus(), cards * resources.amount if resources.name == "CPU" else 1),
                resources=own,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **_QUIET,
            )
        except (OSError, RuntimeError) as error:
            raise InputError(f"Ray can't be started on this machine: {one_line(error)}") from None
    with _nothing_printed():
        try:
            yield
        finally:
            ray.shutdown()


CONNECT_TIMEOUT_S = 60.0
"""Seconds in which a cluster's head has to answer."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "gaudi-batch"}


def _quieten() -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Ray would warn of a coming change of this default at each start.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextlib.contextmanager
def _nothing_printed() -> Iterator[None]:
    """Keeps Ray from writing to standard output, which is for a command's result, what its nodes report, such as that a
    worker died. Whoever uses the worker learns of that, too, and logs it."""
    printing = ray_worker.print_to_stdstream
    ray_worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = printing


def _name_modules() -> None:
    """Tells a Ray that is started here the numbers of this machine's modules: it would count from 0, and a share of a
    node may have 4 to 7."""
    if VISIBLE_MODULES in os.environ or shutil.which("hl-smi") is None:
        return
    query = ["hl-smi", "-Q", "module_id", "-f", "csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=HL_SMI_TIMEOUT_S, check=False)
    modules = [line.strip() for line in answer.stdout.splitlines() if line.strip().isdigit()]
    if answer.returncode == 0 and modules:
        os.environ[VISIBLE_MODULES] = ",".join(sorted(modules, key=int))


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Has a Ray that is started meanwhile listen where this machine alone hears it.

    Ray asks for a token, but on Linux it opens its ports to the network, also for a cluster of one machine, and makes
    the network's address of a `_node_ip_address` of 127.0.0.1. On macOS and Windows it stays on the loopback address;
    this is its own switch for that. Its processes read it from the environment, this one has read it already.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[0]


def cards_expected(config: JobConfig, resources: CardResources) -> int:
    """How many cards a job may have, at least 1: as many as it names, else those that it asks the cluster for or that
    the cluster has now."""
    if config.cards != "all":
        return config.cards
    return config.max_cards or max(1, config.min_cards, cluster_capacity(config, resources).cards)


def cluster_capacity(config: JobConfig, resources: CardResources) -> Capacity:
    """What the cluster has for a job now."""
    leaving = frozenset(state.get_draining_nodes())
    nodes = {node["NodeID"]: resources.on(node) for node in ray.nodes() if node["Alive"]}
    total_cards = cards = sum(on_node for node, on_node in nodes.items() if node not in leaving)
    if config.cards != "all":
        cards = min(config.cards, total_cards)
    elif resources.name == "CPU":
        cards = min(DEFAULT_CARDS, total_cards)
    return Capacity(cards, total_cards, frozenset(nodes), leaving)
