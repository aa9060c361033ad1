"""The places of cards in the cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gaudi_batch import JobConfig
from gaudi_batch.cluster.connection import CardResources
from gaudi_batch.driver.places import Places


def test_cards_that_started_early_and_are_not_asked_for_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        id = None

    removed: list[Group] = []
    monkeypatch.setattr("gaudi_batch.driver.places.placement_group", lambda *_, **__: Group())
    monkeypatch.setattr("gaudi_batch.driver.places.remove_placement_group", removed.append)
    job = SimpleNamespace(config=JobConfig(prompts="p", output="o", device="simulated"))
    setup: Any = SimpleNamespace(driver="a", job=job)
    places = Places(setup, CardResources("HPU", 1))
    places.create_early(range(3))
    third = places._groups[2]
    places.create((0, 1))
    assert removed == [third]
    places.create((2, 3))
    assert sorted(places._groups) == [0, 1, 2, 3]
    assert removed == [third], "the first question alone settles it"
