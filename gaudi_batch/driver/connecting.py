"""The connection to a run's cluster: checked early, made when the run needs a card."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gaudi_batch.cluster.address import is_cluster
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.driver.signals import handlers_kept
from gaudi_batch.errors import InputError
from gaudi_batch.job import Job
from gaudi_batch.output.lease import LeaseKeeper

if TYPE_CHECKING:
    from gaudi_batch.cluster.connection import CardResources

log = logging.getLogger(__name__)


@contextlib.contextmanager
def connected_early(config: JobConfig, address: str | None, device: str | None) -> Iterator[None]:
    """Connects before the job is resolved if the cluster has to tell which device `auto` is. The run then uses this
    connection.

    Args:
        config: the job.
        address: of the cluster, as `address_of` gives it.
        device: that of the run that is in the output; None where there is none.

    Raises:
        InputError: no cluster answers.
    """
    if config.device != "auto" or device is not None or not is_cluster(address):
        yield
        return
    import_all()
    from gaudi_batch.cluster.connection import attached

    with handlers_kept() as restore, attached(address):
        restore()
        yield


def import_all() -> None:
    """Imports all that a run needs before it connects: of a job of the Jobs API, Ray may remove the directory that
    these modules lie in. Ray is slow to import, so this is not done sooner."""
    import gaudi_batch.driver.drive
    import gaudi_batch.driver.trial  # noqa: F401


@contextlib.contextmanager
def cluster_of(job: Job, address: str | None, lease: LeaseKeeper) -> Iterator[Callable[[], CardResources]]:
    """Yields a function that returns what a card takes of the cluster; its first call connects, or starts Ray. It is
    called before anything is written or removed that only cards can complete.

    Raises:
        InputError: there is no cluster, or it has no card for the job.
    """
    with contextlib.ExitStack() as opened:

        @functools.cache
        def cards() -> CardResources:
            import_all()
            from gaudi_batch.cluster.connection import card_resources, cluster_capacity, connected
            from gaudi_batch.cluster.placement import remove_groups_of

            started = time.monotonic()
            restore = opened.enter_context(handlers_kept())
            opened.enter_context(connected(job, address))
            restore()
            remove_groups_of(lease.past_holders)
            resources = card_resources(job)
            count, device = cluster_capacity(job.config, resources).cards, job.config.device
            if count == 0 and not job.config.asks_for_cards:
                needs = f"{resources.amount} {resources.name} a card"
                fewer = "take fewer with --cpu.threads, " if resources.name == "CPU" else ""
                raise InputError(
                    f"the cluster has no card for this job, which needs {needs}; {fewer}add nodes that have, ask its"
                    " autoscaler for them with --max-cards, or choose another device"
                )
            log.info("Ray is ready after %.1f s; %d cards, device %s", time.monotonic() - started, count, device)
            return resources

        yield cards
