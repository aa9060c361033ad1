"""How long each driver of a run drove it: a list in progress.json, which the next driver continues, and in
summary.json."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Annotated

from pydantic import Field, TypeAdapter

from gaudi_batch.output.cost import Price
from gaudi_batch.output.reader import OutputReader


@dataclass(frozen=True)
class Span:
    """The time of one driver with a run."""

    driver: str
    """Prefix of its attempts."""
    started_at: str
    """When its command began, ISO 8601, UTC."""
    ended_at: str
    """When it last wrote this. A driver that was killed may have gone on for up to the interval between two writes of
    progress.json, 5 s where storage is well."""
    wall_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Seconds between the two, by a monotonic clock."""
    card_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds for which it held cards, each counted by itself: from when the cluster gave it one until it gave that
    back or last wrote this down. Loading counts, and so does a quarantined card, which is held so that nothing lands on
    it. None in what older code wrote."""
    node_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Seconds for which it held at least one card of a node, each node counted by itself. None in what older code
    wrote."""
    cost: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """What these cost by the price that its command named; None if it named none."""


@dataclass(frozen=True)
class Held:
    """What a driver holds, and has held, of the cluster."""

    card_s: float = 0.0
    """As in `Span`."""
    node_s: float = 0.0
    """As in `Span`."""
    cards: int = 0
    """Cards that it holds now."""
    nodes: int = 0
    """Nodes of which it holds a card now."""


_SPANS = TypeAdapter(list[Span])


class Stopwatch:
    """The span of a driver that is running.

    Args:
        driver: prefix of its attempts.
        price: what cards cost it; None if its command names no price.
    """

    def __init__(self, driver: str, price: Price | None = None) -> None:
        self._driver = driver
        self._price = price
        self._started_at = _now()
        self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since its command began."""
        return time.monotonic() - self._since

    def span(self, held: Held) -> Span:
        """Its span so far, with what it held of the cluster."""
        card_s, node_s = round(held.card_s, 3), round(held.node_s, 3)
        cost = self._price.cost(card_s, node_s) if self._price else None
        cost = None if cost is None else round(cost, 6)
        return Span(self._driver, self._started_at, _now(), round(self.seconds, 3), card_s, node_s, cost)


def read_spans(ledger: OutputReader) -> list[Span]:
    """The recorded spans of a run's drivers; drivers of older code recorded none."""
    spans: dict[str, Span] = {}
    for name in ("progress.json", "summary.json"):
        try:
            spans_of_file = _SPANS.validate_python((ledger.get_json(name) or {}).get("drivers", []))
        except ValueError:
            continue
        for span in spans_of_file:
            if span.driver not in spans or span.wall_s > spans[span.driver].wall_s:
                spans[span.driver] = span
    return sorted(spans.values(), key=lambda span: span.started_at)


def wall_seconds(spans: Collection[Span], drivers: Collection[str]) -> float | None:
    """The sum of all spans; None if a driver that committed something has none.

    Args:
        spans: those that are known.
        drivers: who committed something.
    """
    if not spans or not set(drivers) <= {span.driver for span in spans}:
        return None
    return round(sum(span.wall_s for span in spans), 3)


def card_hours(spans: Collection[Span], drivers: Collection[str]) -> float | None:
    """Hours for which all drivers held cards, summed over the cards; None if those of a driver that committed something
    are unknown.

    Args:
        spans: those that are known.
        drivers: who committed something.
    """
    seconds = [span.card_s for span in spans if span.card_s is not None]
    known = len(seconds) == len(spans) and wall_seconds(spans, drivers) is not None
    return round(sum(seconds) / 3600, 4) if known else None


def costs(spans: Iterable[Span], price: Price | None) -> list[float | None]:
    """What each driver cost: by the price that it had, else by another; None for each of which that is not known.

    Args:
        spans: those that are known.
        price: for those that had none; None leaves their costs unknown.
    """
    return [
        price.cost(span.card_s, span.node_s) if span.cost is None and price is not None else span.cost for span in spans
    ]


def whole_cost(spans: Collection[Span], price: Price | None) -> float | None:
    """What all drivers cost; None if that of one is not known, or there is none. See `costs`."""
    of_each = costs(spans, price)
    known = [cost for cost in of_each if cost is not None]
    return sum(known) if known and len(known) == len(of_each) else None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
