"""One card of the cluster is tried before a run is removed for a new one: a finished run is worth more than no run."""

from __future__ import annotations

import logging

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gaudi_batch.card import where_am_i
from gaudi_batch.cluster import CardResources, card_options
from gaudi_batch.errors import RunStopped
from gaudi_batch.generation import describe_error
from gaudi_batch.job import Job
from gaudi_batch.pipelines import load_pipeline
from gaudi_batch.slot import group_name, why_died

log = logging.getLogger("gaudi_batch")

MAX_TRIES = 3
"""Cards that may fail to load before the job is held to be wrong and not the cards."""
OTHER_CARD_TIMEOUT_S = 10.0
"""How long the cluster may take to give another card when one has failed; it may have no other that is free."""


class _Trial:
    """The actor: a card that loads and does no more."""

    def load(self, job: Job) -> str:
        """Loads the job's pipeline; returns what went wrong, if anything did."""
        try:
            load_pipeline(job.config, job.model, job.threads, where_am_i(job.config.device)[2])
        except Exception as error:
            return describe_error(error)
        return ""


def try_card(job: Job, resources: CardResources, driver: str) -> None:
    """Has a card load a job's model, and gives it back. One that can't is held meanwhile, so that the next is another.

    Args:
        job: the job.
        resources: what a card takes of the cluster.
        driver: prefix of this driver's attempts.

    Raises:
        RunStopped: no card was free within `limits.cluster`, or none loaded within `limits.loading`.
    """
    limits = job.config.limits
    groups = []
    error = ""
    try:
        for number in range(MAX_TRIES):
            groups.append(placement_group([resources.bundle], name=group_name(driver, f"trial-{number}")))
            if not groups[-1].wait(OTHER_CARD_TIMEOUT_S if error else limits.cluster):
                error = error or f"no card was free for {limits.cluster:g} s (limits.cluster)"
                break
            strategy = PlacementGroupSchedulingStrategy(groups[-1], 0)
            trial = ray.remote(_Trial).options(**card_options(job.config, resources), scheduling_strategy=strategy)
            try:
                error = ray.get(trial.remote().load.remote(job), timeout=limits.loading)
            except GetTimeoutError:
                error = f"loading took longer than {limits.loading:g} s (limits.loading)"
                break
            except RayError as died:
                error = why_died(died)
            if not error:
                return
            log.warning("a card can't load the model: %s", error)
    finally:
        for group in groups:
            remove_placement_group(group)
    raise RunStopped(f"stopped before anything was removed, as no card can be had: {error}")
