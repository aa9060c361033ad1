"""What Ray says of actors, nodes and placement groups is understood."""

from __future__ import annotations

from typing import Any

import pytest

from gaudi_batch.cluster import placement

GROUPS = {
    "1": {"name": "gaudi-batch-aaaaaa-0", "state": "CREATED"},
    "2": {"name": "gaudi-batch-aaaaaa-1", "state": "REMOVED"},
    "3": {"name": "gaudi-batch-aaaaab-0", "state": "CREATED"},
    "4": {"name": "gaudi-batch-bbbbbb-0", "state": "PENDING"},
    "5": {"name": "somebody's", "state": "CREATED"},
}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "The actor is dead.\n\tWorker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a"
            " connection error code 2. End of file. Some common causes include: (1) the process was killed",
            "Worker unexpectedly exits with a connection error code 2. End of file.",
        ),
        (
            "The actor died because of an error raised in its creation task, \x1b[36mray::Card.__init__\x1b[39m",
            r"\x1b[36mray::Card.__init__\x1b[39m",
        ),
        ("something new", "RuntimeError: something new"),
    ],
)
def test_the_reason_for_a_death_is_ray_s_own_without_its_guesses(message: str, reason: str) -> None:
    assert placement.why_died(RuntimeError(message)) == reason


def test_a_node_is_gone_if_ray_says_so_or_no_longer_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": "up", "Alive": True}, {"NodeID": "down", "Alive": False}]
    monkeypatch.setattr("gaudi_batch.cluster.placement.ray.nodes", lambda: nodes)
    killed = RuntimeError("killed")
    assert placement.node_is_gone("down", killed)
    assert placement.node_is_gone("never seen", killed)
    assert not placement.node_is_gone("up", killed)
    assert not placement.node_is_gone("", killed), "the cluster has not placed that card"
    assert placement.node_is_gone("up", RuntimeError("The actor died because its node has died."))


def test_the_groups_of_drivers_that_have_ended_are_removed_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []

    def get(name: str) -> str:
        if name.endswith("b-0"):
            raise ValueError(f"{name} has just gone")
        return name

    monkeypatch.setattr(placement, "placement_group_table", lambda: GROUPS)
    monkeypatch.setattr(placement, "get_placement_group", get)
    monkeypatch.setattr(placement, "remove_placement_group", removed.append)
    placement.remove_groups_of([])
    assert removed == []
    placement.remove_groups_of(["aaaaaa", "bbbbbb"])
    assert removed == ["gaudi-batch-aaaaaa-0"]


def test_a_group_that_is_no_longer_placed_has_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = object()
    monkeypatch.setattr(placement, "placement_group_table", lambda _: {"bundles_to_node_id": {0: "node"}})
    assert placement.node_of(group) == "node"
    monkeypatch.setattr(placement, "placement_group_table", lambda _: {"bundles_to_node_id": {}})
    assert placement.node_of(group) == ""
