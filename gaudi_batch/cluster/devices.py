"""Which device `auto` is: hpu where there are Gaudi cards and Intel's stack, else cpu."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
import time

from gaudi_batch.cluster.address import is_cluster
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

DEVICE_COUNT_TIMEOUT_S = 120.0
"""Seconds that a process may take to count the cards of its machine, which includes importing torch."""
NODES_TIMEOUT_S = 60.0
"""Seconds that nodes may take to say what cards they have, which includes the start of a process on each."""
MAX_NODES_ASKED = 8
"""Most nodes that are asked; one that has what hpu needs is enough."""
_COUNT = "import habana_frameworks.torch.hpu as hpu; print(); print(hpu.device_count())"


def with_device(config: JobConfig, address: str | None, recorded: str | None = None) -> JobConfig:
    """The job with a device other than auto.

    Args:
        config: the job.
        address: the Ray cluster that it is for; None or "local" is this machine.
        recorded: the device as the run's first driver found it, if there was one.

    Raises:
        InputError: there is no cluster at the address, or the cards that it will have can't be seen yet.
    """
    if config.device != "auto":
        return config
    if recorded is not None:
        return config.model_copy(update={"device": recorded})
    device = "hpu" if (_cluster_has_cards(address) if is_cluster(address) else this_machine_has_cards()) else "cpu"
    if device == "cpu" and config.asks_for_cards:
        raise InputError("device auto: the cluster has no card yet that could tell; name the device, hpu or cpu")
    log.debug("device auto is %s here", device)
    return config.model_copy(update={"device": device})


def this_machine_has_cards() -> bool:
    """Whether Intel's stack is here and finds a card; asked in a process of its own, since this one needs no device."""
    if importlib.util.find_spec("habana_frameworks") is None:
        return False
    probe = subprocess.run(
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, timeout=DEVICE_COUNT_TIMEOUT_S, check=False
    )
    answer = probe.stdout.split()[-1:]
    return probe.returncode == 0 and answer not in ([], ["0"])


def _cluster_has_cards(address: str | None) -> bool:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from gaudi_batch.cluster.connection import attached

    with attached(address):
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("HPU")]
        pending = [
            ray.remote(_has_stack)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote()
            for node in nodes[:MAX_NODES_ASKED]
        ]
        problem, until = "", time.monotonic() + NODES_TIMEOUT_S
        while pending:
            answered, pending = ray.wait(pending, timeout=max(0.0, until - time.monotonic()))
            if not answered:
                problem = problem or f"no answer for {NODES_TIMEOUT_S:.0f} s"
                break
            try:
                if ray.get(answered[0]):
                    return True
            except RayError as error:
                problem = one_line(str(error).strip().rpartition("\n")[2])
    if problem:
        raise InputError(f"device auto: not every node with cards says what they are ({problem}); name the device")
    return False


def _has_stack() -> bool:
    return importlib.util.find_spec("habana_frameworks") is not None
