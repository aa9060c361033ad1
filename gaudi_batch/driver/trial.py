"""Tries one card of the cluster before a finished run is removed for a new one."""

from __future__ import annotations

import logging
from collections import Counter

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gaudi_batch.cluster.connection import CardResources, card_options, cluster_capacity
from gaudi_batch.cluster.placement import card_placement, group_name, node_of, why_died
from gaudi_batch.errors import RunStopped
from gaudi_batch.job import Job
from gaudi_batch.pipelines import load_pipeline
from gaudi_batch.text import describe_error

log = logging.getLogger(__name__)

OTHER_CARD_TIMEOUT_S = 10.0
"""Seconds that the cluster may take to give another card after one has failed; it may have no other that is free."""


class _Trial:
    """The actor: a card that loads and does no more."""

    def load(self, job: Job) -> str:
        """Loads the job's pipeline; returns what went wrong, if anything did."""
        try:
            load_pipeline(job.config, job.model, job.threads, card_placement(job.config.device)[2])
        except Exception as error:
            return describe_error(error)
        return ""


def try_card(job: Job, resources: CardResources, driver: str) -> None:
    """Has a card load the job's model, and gives it back. A card that can't load is held meanwhile, so that the next
    one is another card, on the node where the fewest have failed; this goes on until no other card is free.

    Args:
        job: the job.
        resources: what a card takes of the cluster.
        driver: prefix of this driver's attempts.

    Raises:
        RunStopped: no card was free within `limits.cluster`, or none that was free loaded within `limits.loading`.
    """
    limits = job.config.limits
    groups: list[PlacementGroup] = []
    failures: Counter[str] = Counter()  # by node
    error = ""
    try:
        while not error or len(groups) < cluster_capacity(job.config, resources).total_cards:
            groups.append(_occupy(resources, group_name(driver, f"trial-{len(groups)}"), failures))
            if not groups[-1].wait(OTHER_CARD_TIMEOUT_S if error else limits.cluster):
                break
            error = _failure_to_load(job, resources, groups[-1])
            if not error:
                return
            failures[node_of(groups[-1])] += 1
            log.warning("a card can't load the model: %s", error)
    finally:
        for group in groups:
            remove_placement_group(group)
    if error:
        why = f"of {sum(failures.values())} cards that were free none could load the model; the last: {error}"
    else:
        why = f"no card was free for {limits.cluster:g} s (limits.cluster)"
    raise RunStopped(f"stopped before anything was removed, as {why}")


def _occupy(resources: CardResources, name: str, failures: Counter[str]) -> PlacementGroup:
    """Asks for a card: once some have failed, on the node where the fewest have, if one is free there."""
    nodes = {node["NodeID"]: resources.on(node) for node in ray.nodes() if node["Alive"]} if failures else {}
    left = [node for node, cards in nodes.items() if cards > failures[node]]
    target = min(left, key=lambda node: failures[node], default=None)
    return placement_group([resources.bundle], "STRICT_PACK", name, _soft_target_node_id=target)


def _failure_to_load(job: Job, resources: CardResources, group: PlacementGroup) -> str:
    """Why the card that is held could not load the model; empty if it could."""
    strategy = PlacementGroupSchedulingStrategy(group, 0)
    trial = ray.remote(_Trial).options(**card_options(job.config, resources), scheduling_strategy=strategy).remote()
    try:
        return str(ray.get(trial.load.remote(job), timeout=job.config.limits.loading))
    except GetTimeoutError:
        return f"loading took longer than {job.config.limits.loading:g} s (limits.loading)"
    except RayError as died:
        return why_died(died)
