"""What Ray says of cards' placement groups, actors and nodes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Collection

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group_table,
    remove_placement_group,
)

from gaudi_batch.text import describe_error


def why_died(error: Exception) -> str:
    """Ray's reason for the death of an actor, without its guesses."""
    reason = describe_error(error)
    reason = reason.partition(" Some common causes")[0]
    for mark in (
        "Worker exit detail: ",
        "The actor died because of an error raised in its creation task, ",
        "System error: ",
    ):
        if mark in reason:
            return reason.partition(mark)[2]
    return reason


def group_name(driver: str, number: int | str = "") -> str:
    """The name of the placement group of a driver's card; without a number, how the names of all of that driver's
    groups begin."""
    return f"gaudi-batch-{driver}-{number}"


def remove_groups_of(drivers: Collection[str]) -> None:
    """Removes the placement groups of drivers that are over: one that stands still, or is cut off from storage alone,
    would keep its cards, and these would write images that nobody counts."""
    prefixes = tuple(map(group_name, drivers))
    for group in placement_group_table().values():
        if prefixes and group["name"].startswith(prefixes) and group["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # it has just gone
                remove_placement_group(get_placement_group(group["name"]))


def node_of(group: PlacementGroup) -> str:
    """The node on which a group of one bundle has been placed; empty if it no longer is."""
    return str(placement_group_table(group)["bundles_to_node_id"].get(0, ""))


def node_is_gone(node_id: str, error: Exception) -> bool:
    """Whether an actor died because its node did."""
    if "node" in str(error) and "died" in str(error) and "its node" in str(error):
        return True
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return bool(node_id) and node_id not in alive


def card_placement(device: str) -> tuple[str, str, int | None]:
    """This actor's Ray node id, its host name, and the module that Ray pinned to it, None for device cpu."""
    import ray

    context = ray.get_runtime_context()
    module = None
    if device != "cpu":
        ids = context.get_accelerator_ids().get("HPU", [])
        module = int(ids[0]) if ids else None
    return context.get_node_id(), socket.gethostname(), module
