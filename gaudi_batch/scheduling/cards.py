"""The cards of a run as the schedule sees them, filed by what they can take. Pure, a part of the schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from gaudi_batch.plan import GraphKey
from gaudi_batch.scheduling.affinity import Affinity
from gaudi_batch.scheduling.events import LoadedCard, Reading

MAX_IN_FLIGHT = 2
"""Shards in flight on one card: the one that it works on and the one after."""


class CardState(Enum):
    """Where a card is in its life."""

    WAITING = "waiting for the cluster"
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    QUARANTINED = "quarantined"
    GONE = "gone"


class CardChange(Enum):
    """What moves a card from one state to another."""

    PLACED = "the cluster gives it a place"
    ADMITTED = "it has loaded, and is admitted"
    REPLACED = "its process failed, and another is started"
    GIVEN_UP = "it failed too often, or would make other images"
    NODE_LEAVES = "its node announces its end"
    RELEASED = "it has finished what it had begun"
    NODE_GONE = "its node is gone"


TRANSITIONS: Mapping[tuple[CardState, CardChange], CardState] = {
    (CardState.WAITING, CardChange.PLACED): CardState.STARTING,
    (CardState.STARTING, CardChange.ADMITTED): CardState.READY,
    (CardState.STARTING, CardChange.REPLACED): CardState.STARTING,
    (CardState.READY, CardChange.REPLACED): CardState.STARTING,
    (CardState.STARTING, CardChange.GIVEN_UP): CardState.QUARANTINED,
    (CardState.READY, CardChange.GIVEN_UP): CardState.QUARANTINED,
    (CardState.STARTING, CardChange.NODE_LEAVES): CardState.LEAVING,
    (CardState.READY, CardChange.NODE_LEAVES): CardState.LEAVING,
    (CardState.LEAVING, CardChange.RELEASED): CardState.GONE,
    (CardState.STARTING, CardChange.NODE_GONE): CardState.GONE,
    (CardState.READY, CardChange.NODE_GONE): CardState.GONE,
    (CardState.LEAVING, CardChange.NODE_GONE): CardState.GONE,
    (CardState.QUARANTINED, CardChange.NODE_GONE): CardState.GONE,
}
"""The life of a card: its state after each change; a change that is not here can't happen in that state."""

LIVE_STATES = (CardState.STARTING, CardState.READY)
"""A card is ready for work, or will be."""


def state_diagram() -> str:
    """The life of a card as Mermaid draws it, from `TRANSITIONS`."""
    arrows = [f"    {before.name} --> {after.name}: {change.value}" for (before, change), after in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", "    [*] --> WAITING", *arrows, "    GONE --> [*]"])


@dataclass(eq=False)
class Card:
    """One card and its record."""

    number: int
    node: str
    state: CardState = CardState.WAITING
    loaded: LoadedCard | None = None
    """What its present process says of itself; None before that has loaded, and when it has ended."""
    in_flight: dict[str, None] = field(default_factory=dict)
    """Attempts, oldest first."""
    suspect: bool = False
    """Whether what it has in flight is a suspect shard, beside which it gets no other."""
    reserved_for: int | None = None
    """The suspect shard that it gets next, when nothing is in flight on it."""
    has_succeeded: bool = False
    """Whether it has made a batch since its process began."""
    has_made: bool = False
    """Whether it has ever made one."""
    consecutive_failures: int = 0
    """Failures in a row."""
    start_failures: int = 0
    """Processes in a row that said that they could not make a batch."""
    shards_made_elsewhere: int = 0
    """Times that others made all that it failed."""
    images: int = 0
    transient_failures: int = 0
    """Images and calls that failed on it and worked when they were made again."""
    fruitless_nodes: int = 0
    """Nodes that had been lost in a row, with nothing made, when it was started."""
    _filed: dict[int, Card] | None = None
    _filed_keys: tuple[dict[int, Card], ...] = ()
    _counted_on: str | None = None

    def may(self, change: CardChange) -> bool:
        """Whether a change can happen in its state."""
        return (self.state, change) in TRANSITIONS


class Cards:
    """All cards, filed so that an event costs the same with ten cards or ten thousand.

    Args:
        affinity: which graphs they have captured.
    """

    def __init__(self, affinity: Affinity) -> None:
        self.by_number: dict[int, Card] = {}
        """Those that the cluster has placed."""
        self.unplaced: dict[int, None] = {}
        """Those that it has been asked for and has not placed, oldest first."""
        self.starting: dict[int, Card] = {}
        self.open: list[dict[int, Card]] = [{} for _ in range(MAX_IN_FLIGHT)]
        """Ready and able to take a shard, by the number of shards in flight on them."""
        self.open_by_key: list[dict[GraphKey, dict[int, Card]]] = [{} for _ in range(MAX_IN_FLIGHT)]
        """The same by the graph keys that they have captured."""
        self.full: dict[int, Card] = {}
        """Ready, with `MAX_IN_FLIGHT` shards."""
        self.apart: dict[int, Card] = {}
        """Ready, and kept free of other shards for the sake of a suspect one."""
        self.leaving_idle: dict[int, Card] = {}
        """Leaving, with nothing in flight."""
        self.exclusive: dict[str, int] = {}
        """Nodes that are kept for one suspect shard alone."""
        self.lost: set[str] = set()
        """Nodes that went without notice, whose other cards are gone as well, though nobody has said so yet."""
        self.attempts_on_node: Counter[str] = Counter()
        """Attempts on each node."""
        self.live_on: dict[str, int] = {}
        """Cards that are ready or starting, by node; none has 0."""
        self._on: dict[str, dict[int, Card]] = {}
        self._affinity = affinity

    def live_cards(self) -> int:
        """How many are ready or starting."""
        return len(self.starting) + len(self.full) + len(self.apart) + sum(map(len, self.open))

    def without_work(self) -> int:
        """How many will take a shard before any gets its second."""
        return len(self.starting) + len(self.open[0])

    def others(self, than: set[int], starting: bool = True) -> bool:
        """Whether a card is ready, or starting if that counts, that is none of these."""
        filed = (*self.open, self.full, self.apart, *([self.starting] if starting else []))
        return any(number not in than for cards in filed for number in cards)

    def add(self, card: Card) -> None:
        """A card is there."""
        self.by_number[card.number] = card
        self._on.setdefault(card.node, {})[card.number] = card

    def move(self, card: Card, node: str) -> None:
        """A card is on another node now."""
        del self._on[card.node][card.number]
        card.node = node
        self._on.setdefault(node, {})[card.number] = card
        self.lost.discard(node)

    def state(self, number: int) -> CardState:
        """Where a card is in its life."""
        card = self.by_number.get(number)
        return CardState.WAITING if card is None else card.state

    def in_states(self, *states: CardState) -> list[Card]:
        """The cards in one of these states."""
        return [card for card in self.by_number.values() if card.state in states]

    def on(self, node: str) -> list[Card]:
        """The cards of a node."""
        return list(self._on.get(node, {}).values())

    def file(self, card: Card) -> None:
        """Puts a card where it belongs, after anything about it has changed."""
        if card._filed is not None:
            del card._filed[card.number]
        for holders in card._filed_keys:
            del holders[card.number]
        if card._counted_on is not None:
            self._count(card._counted_on, -1)
        card._filed, card._filed_keys, card._counted_on = self._place(card), (), None
        if card._filed is None:
            return
        if card._filed is not self.leaving_idle:
            card._counted_on = card.node
            self._count(card.node, 1)
        card._filed[card.number] = card
        for level, open_cards in enumerate(self.open):
            if card._filed is open_cards:
                by_key = self.open_by_key[level]
                card._filed_keys = tuple(by_key.setdefault(key, {}) for key in self._affinity.captured(card.number))
        for holders in card._filed_keys:
            holders[card.number] = card

    def _count(self, node: str, change: int) -> None:
        count = self.live_on.get(node, 0) + change
        if count:
            self.live_on[node] = count
        else:
            del self.live_on[node]

    def _place(self, card: Card) -> dict[int, Card] | None:
        if card.state is CardState.STARTING:
            return self.starting
        if card.state is CardState.LEAVING and not card.in_flight:
            return self.leaving_idle
        if card.state is not CardState.READY:
            return None
        if card.suspect or card.reserved_for is not None or card.node in self.exclusive or card.node in self.lost:
            return self.apart
        return self.open[len(card.in_flight)] if len(card.in_flight) < MAX_IN_FLIGHT else self.full


@dataclass
class Attempt:
    """A shard in flight on a card."""

    shard: int
    card: Card
    captures: bool  # whether its graph key is new to the card
    at: Reading | frozenset[int] | None = None  # what it has announced last
    recallable: bool = True
    begun: bool = False  # its card has begun to read it
    generating: bool = False  # its card has begun to make it
