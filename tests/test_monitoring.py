"""The dashboard is one that Grafana reads, and it and the docs have the metrics that a run records."""

from __future__ import annotations

import inspect
import json
import math
import re
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from helpers import REPOSITORY

from gaudi_batch.card.work import BATCH_BOUNDS_S
from gaudi_batch.driver import metrics
from gaudi_batch.driver.metrics import MAX_CARDS, METRICS
from gaudi_batch.scheduling.cards import CardState

TEXT = (REPOSITORY / "monitoring/grafana-dashboard.json").read_text()
DASHBOARD: dict[str, Any] = json.loads(TEXT)
DOCS = (REPOSITORY / "docs/monitoring.md").read_text()


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    """By the classes that Grafana makes of its schemas, which drop what these do not have, and add defaults."""
    register_default_plugins()
    read = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(DASHBOARD)))
    assert list(dropped(DASHBOARD, read)) == []
    assert list(unknown_values(Dashboard.from_json(DASHBOARD))) == []
    assert list(dropped({"panels": [{"type": "stat", "tile": ""}]}, read)) == ["panels/0/tile"]


def unknown_values(part: Any) -> Iterator[str]:
    """Fields of an object that Grafana's classes were made of, and of those in it, that have a value which they do not
    know; the classes take any."""
    if isinstance(part, (list, dict)):
        for item in part.values() if isinstance(part, dict) else part:
            yield from unknown_values(item)
    elif type(part).__module__.startswith("grafana_foundation_sdk.models"):
        hints = typing.get_type_hints(type(part))
        for name, value in vars(part).items():
            kinds: list[type[Enum]] = [
                kind
                for kind in (hints[name], *typing.get_args(hints[name]))
                if isinstance(kind, type) and issubclass(kind, Enum)
            ]
            if value is not None and kinds and value not in [member.value for kind in kinds for member in kind]:
                yield f"{name}: {value}"
            yield from unknown_values(value)


def dropped(written: Any, read: Any) -> Iterator[str]:
    """Where something was written that was not read as it is."""
    if isinstance(written, dict) and isinstance(read, dict):
        for name, value in written.items():
            yield from (f"{name}/{place}".rstrip("/") for place in dropped(value, read.get(name)))
    elif isinstance(written, list) and isinstance(read, list) and len(written) <= len(read):
        for number, value in enumerate(written):
            yield from (f"{number}/{place}".rstrip("/") for place in dropped(value, read[number]))
    elif written != read:
        yield ""


def test_panels_have_places_and_numbers_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells
        taken |= cells
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names)


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    names = {re.sub(r"_bucket$", "", name) for name in re.findall(r"ray_gaudi_batch_\w+", TEXT)}
    assert names == {f"ray_{metric.name}" for metric in METRICS}


def test_the_docs_list_every_metric_with_its_kind_and_labels() -> None:
    rows = re.findall(r"^\| `(ray_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", DOCS, re.MULTILINE)
    assert rows == [
        (f"ray_{metric.name}", metric.kind, ", ".join(f"`{name}`" for name in metric.labels), metric.description)
        for metric in METRICS
    ]
    assert f"the first {MAX_CARDS} cards" in DOCS
    assert f"at most {series(MAX_CARDS + 1)} series" in DOCS
    assert f"with 8 cards, {series(8)}" in DOCS
    assert f"what is scraped: {series(MAX_CARDS + 1)} at most." in inspect.getsource(metrics)


def series(cards: int) -> int:
    """How many series a driver adds that has series of its own for so many cards."""
    values = {"card": cards, "state": len(CardState), "phase": 2}
    parts = {"histogram": len(BATCH_BOUNDS_S) + 3}  # the last bucket, the count and the sum
    return sum(parts.get(metric.kind, 1) * math.prod(values[label] for label in metric.labels) for metric in METRICS)
