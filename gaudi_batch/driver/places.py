"""What Ray is asked to do for the slots of a run: their placement groups, and the actors in these.

Each of these calls may wait for Ray's control service, so the event loop makes none of them, nor the main thread, which
a signal could reach amid one: they are made in a thread of their own, one after the other, in the order in which they
were decided on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gaudi_batch.card.actor import Card
from gaudi_batch.card.messages import CardSetup
from gaudi_batch.cluster.connection import CardResources, card_options
from gaudi_batch.cluster.model_peers import CALLS, GROUP, start_tracker
from gaudi_batch.cluster.placement import group_name

CARD_CALLS = 4
"""Calls that a card takes at the same time: polls, shards, and recalls of shards."""


@dataclass(frozen=True)
class CardsOfRun:
    """What all cards of a run have in common."""

    setup: CardSetup
    """The job, as each card gets it."""
    resources: CardResources
    """What one takes of the cluster."""
    places: Places
    """Their places in the cluster."""

    @classmethod
    def of(cls, setup: CardSetup, resources: CardResources) -> CardsOfRun:
        """The cards of a run, none of which is asked for yet."""
        return cls(setup, resources, Places(setup, resources))


class Places:
    """The places of a run's cards in the cluster, by the numbers of their slots. For one thread at a time.

    Args:
        setup: the job, as the cards get it.
        resources: what one card takes of the cluster.
    """

    def __init__(self, setup: CardSetup, resources: CardResources) -> None:
        self._setup = setup
        self._resources = resources
        self._options = card_options(setup.job.config, resources)
        self._setup_ref: Any = None
        self._card: Any = None  # exported to the cluster once, not at each start
        self.placed_at: dict[int, float] = {}
        """When it was first seen that a slot has its place, monotonic."""
        self.started_at: dict[int, float] = {}
        """When the present process of a slot was started, monotonic."""
        self._groups: dict[int, PlacementGroup] = {}
        self._early: set[int] = set()
        self._actors: dict[int, Any] = {}

    def create_early(self, numbers: Iterable[int]) -> None:
        """Asks the cluster for places before the schedule does. Those that the schedule does not ask for with its first
        question are given back then."""
        self.create(numbers)
        self._early = set(self._groups)

    def create(self, numbers: Iterable[int]) -> None:
        """Asks the cluster for a place for each of these slots that has none."""
        asked, early, self._early = set(numbers), self._early, set()
        for number in early - asked:
            self.remove(number)
        for number in sorted(asked.difference(self._groups)):
            name = group_name(self._setup.driver, number)
            self._groups[number] = placement_group([self._resources.bundle], strategy="PACK", name=name)

    def placed(self, numbers: Collection[int]) -> dict[int, str]:
        """Those of these slots that have their place, each with the id of its node. One question for all."""
        table = placement_group_table()
        groups = {number: table.get(self._groups[number].id.hex(), {}) for number in numbers if number in self._groups}
        nodes = {
            number: str(group["bundles_to_node_id"].get(0, ""))
            for number, group in groups.items()
            if group.get("state") == "CREATED"
        }
        self.placed_at = dict.fromkeys(nodes, time.monotonic()) | self.placed_at
        return nodes

    def start(self, number: int) -> Any:
        """Starts a process in a slot's place, unless there is one; returns the Ray actor."""
        if number in self._actors:
            return self._actors[number]
        if self._card is None:
            card = ray.remote(concurrency_groups={GROUP: CALLS})
            self._card, self._setup_ref = card(Card), ray.put(self._with_tracker())
        strategy = PlacementGroupSchedulingStrategy(self._groups[number], 0)
        options = {**self._options, "scheduling_strategy": strategy, "max_concurrency": CARD_CALLS}
        self.started_at[number] = time.monotonic()
        self._actors[number] = self._card.options(**options).remote(self._setup_ref)
        return self._actors[number]

    def _with_tracker(self) -> CardSetup:
        model = self._setup.job.model
        return replace(self._setup, tracker=start_tracker()) if model.hub or model.storage else self._setup

    def kill(self, number: int) -> None:
        """Kills a slot's process, if one has been started, and keeps its place."""
        actor = self._actors.pop(number, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def remove(self, number: int) -> None:
        """Gives a slot's place back, without its process."""
        self.kill(number)
        self.placed_at.pop(number, None)
        group = self._groups.pop(number, None)
        if group is not None:
            remove_placement_group(group)

    def close(self) -> None:
        """Gives all places back."""
        for number in list(self._groups):
            with contextlib.suppress(ValueError, RayError):  # it has just gone; or Ray can't be asked any more
                self.remove(number)
