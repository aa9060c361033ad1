"""How many CPUs a process may use, which may be fewer than its machine has, and a card's share of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """CPUs that this process may use at a time: those of its affinity, but no more than the quotas of its cgroups; at
    least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1  # macOS and Windows have neither
    return max(1, int(min([allowed, *_quotas()])))


def share_of_node() -> int:
    """Threads on the host for this card, a Ray actor: an equal share of the node's usable CPUs among the node's cards;
    at least 1."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    cards = next(node["Resources"].get("HPU", 1) for node in ray.nodes() if node["NodeID"] == here)
    return max(1, usable_cpus() // max(1, int(cards)))  # Ray accepts parts of a card, too


def _quotas() -> Iterator[float]:
    """The CPUs of each cgroup around this process that has a limit."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                root, files = CGROUPS, ["cpu.max"]  # "QUOTA PERIOD", in microseconds, or "max PERIOD"
            elif "cpu" in controllers.split(","):
                root, files = CGROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]  # -1 is no limit
            else:
                continue
            # A container may see its own cgroup as the root, and its path as the host names it.
            group = root / path.strip("/")
            for directory in (group, *group.parents):
                if directory.is_relative_to(root):
                    with contextlib.suppress(OSError, ValueError):
                        quota, period = " ".join((directory / file).read_text() for file in files).split()
                        if float(quota) > 0:
                            yield float(quota) / float(period)
