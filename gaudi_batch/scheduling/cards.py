"""The cards of a run, as the schedule keeps them: filed by what they can take. Pure, a part of the schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
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
    """A change of a card's state."""

    PLACED = "the cluster gives it a place"
    ADMITTED = "it has loaded the model, and is admitted"
    REPLACED = "its process failed, and another is started"
    GIVEN_UP = "it failed too often, or its images would differ from the run's"
    NODE_LEAVES = "its node announces that it will be shut down"
    RELEASED = "it has finished what it had begun"
    NOT_NEEDED = "the run stops, and it has begun nothing"
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
    (CardState.STARTING, CardChange.NOT_NEEDED): CardState.GONE,
    (CardState.READY, CardChange.NOT_NEEDED): CardState.GONE,
    (CardState.QUARANTINED, CardChange.NOT_NEEDED): CardState.GONE,
    (CardState.STARTING, CardChange.NODE_GONE): CardState.GONE,
    (CardState.READY, CardChange.NODE_GONE): CardState.GONE,
    (CardState.LEAVING, CardChange.NODE_GONE): CardState.GONE,
    (CardState.QUARANTINED, CardChange.NODE_GONE): CardState.GONE,
}
"""The life of a card: its next state for each state and change. A change that is missing here can't happen in that
state."""

LIVE_STATES = (CardState.STARTING, CardState.READY)
"""States of cards that work or will."""


def state_diagram() -> str:
    """The life of a card as a Mermaid diagram, from `TRANSITIONS`."""
    arrows = [f"    {before.name} --> {after.name}: {change.value}" for (before, change), after in TRANSITIONS.items()]
    return "\n".join(["stateDiagram-v2", "    [*] --> WAITING", *arrows, "    GONE --> [*]"])


@dataclass(eq=False)
class Card:
    """One card and its record."""

    number: int
    node: str
    state: CardState = CardState.WAITING
    loaded: LoadedCard | None = None
    """What its present process reported when it had loaded; None before that, and after its end."""
    in_flight: dict[str, None] = field(default_factory=dict)
    """Attempts, oldest first."""
    suspect: bool = False
    """Whether a suspect shard is in flight on it; it then gets no other."""
    dropping: str | None = None
    """An attempt that it was told to drop and has not ended yet; it gets nothing else before."""
    reserved_for: int | None = None
    """The suspect shard that it gets next, once nothing is in flight on it."""
    has_succeeded: bool = False
    """Whether its present process has made a batch."""
    has_made: bool = False
    """Whether it has ever made one."""
    consecutive_failures: int = 0
    """Failures in a row."""
    start_failures: int = 0
    """Processes in a row that reported that they could not make a batch."""
    shards_made_elsewhere: int = 0
    """Times that other cards made all that it had failed."""
    images: int = 0
    transient_failures: int = 0
    """Images and calls that failed on it and worked when repeated."""
    fruitless_nodes: int = 0
    """How many nodes in a row had been lost, with nothing made, when it was started."""
    _filed: dict[int, Card] | None = None
    _filed_keys: tuple[dict[int, Card], ...] = ()
    _counted_on: str | None = None

    def may(self, change: CardChange) -> bool:
        """Whether a change is possible in its state."""
        return (self.state, change) in TRANSITIONS


class Cards:
    """All cards, filed so that an event costs as much with ten cards as with ten thousand.

    Args:
        affinity: which graphs they have captured.
    """

    def __init__(self, affinity: Affinity) -> None:
        self.by_number: dict[int, Card] = {}
        """Cards that the cluster has placed."""
        self.unplaced: dict[int, None] = {}
        """Cards that the cluster was asked for and has not placed, oldest first."""
        self.starting: dict[int, Card] = {}
        self.open: list[dict[int, Card]] = [{} for _ in range(MAX_IN_FLIGHT)]
        """Ready cards that can take a shard, by the number of shards in flight on them."""
        self.full: dict[int, Card] = {}
        """Ready cards with `MAX_IN_FLIGHT` shards."""
        self.by_key: list[dict[GraphKey, dict[int, Card]]] = [{} for _ in range(MAX_IN_FLIGHT + 1)]
        """Open and full cards by the graph keys that they have captured, by the number of shards in flight on them."""
        self.apart: dict[int, Card] = {}
        """Ready cards that are kept free for a suspect shard."""
        self.leaving_idle: dict[int, Card] = {}
        """Leaving cards with nothing in flight."""
        self.exclusive: dict[str, int] = {}
        """Nodes that are kept free for one suspect shard."""
        self.lost: set[str] = set()
        """Nodes that went without notice: all their cards are gone, even those whose end is not reported yet."""
        self.attempts_on_node: Counter[str] = Counter()
        """Attempts in flight on each node."""
        self.live_on: dict[str, int] = {}
        """Number of ready or starting cards of each node; no entry is 0."""
        self._on: dict[str, dict[int, Card]] = {}
        self._affinity = affinity

    def live_cards(self) -> int:
        """How many cards are ready or starting."""
        return len(self.starting) + len(self.full) + len(self.apart) + sum(map(len, self.open))

    def without_work(self) -> int:
        """How many cards take a shard before any takes its second."""
        return len(self.starting) + len(self.open[0])

    def others(self, than: set[int], starting: bool = True) -> bool:
        """Whether there is a ready card, or a starting one if that counts, other than these."""
        filed = (*self.open, self.full, self.apart, *([self.starting] if starting else []))
        return any(number not in than for cards in filed for number in cards)

    def add(self, card: Card) -> None:
        """Adds a card."""
        self.by_number[card.number] = card
        self._on.setdefault(card.node, {})[card.number] = card

    def move(self, card: Card, node: str) -> None:
        """Moves a card to another node."""
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

    def nodes_of(self, numbers: Iterable[int]) -> set[str]:
        """The nodes of some cards."""
        return {self.by_number[number].node for number in numbers}

    def free_node(self, node: str, shard: int) -> None:
        """Frees a node if it is kept for this shard."""
        if self.exclusive.get(node) == shard:
            del self.exclusive[node]
            for card in self.on(node):
                self.file(card)

    def file(self, card: Card) -> None:
        """Files a card anew; to be called after each change of it."""
        if card._filed is not None:
            del card._filed[card.number]
        for cards in card._filed_keys:
            del cards[card.number]
        if card._counted_on is not None:
            self._count(card._counted_on, -1)
        card._filed, card._filed_keys, card._counted_on = self._place(card), (), None
        if card._filed is None:
            return
        if card._filed is not self.leaving_idle:
            card._counted_on = card.node
            self._count(card.node, 1)
        card._filed[card.number] = card
        for by_key, cards in zip(self.by_key, (*self.open, self.full), strict=True):
            if card._filed is cards:
                card._filed_keys = tuple(by_key.setdefault(key, {}) for key in self._affinity.captured(card.number))
        for cards in card._filed_keys:
            cards[card.number] = card

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
        if card.dropping is not None:
            return self.apart
        if card.suspect or card.reserved_for is not None or card.node in self.exclusive or card.node in self.lost:
            return self.apart
        return self.open[len(card.in_flight)] if len(card.in_flight) < MAX_IN_FLIGHT else self.full


@dataclass
class Attempt:
    """A shard in flight on a card."""

    shard: int
    card: Card
    captures: bool  # whether the card has to capture its graph key
    at: Reading | frozenset[int] | None = None  # the last announcement
    recallable: bool = True
    begun: bool = False  # whether its card has begun to read it
    generating: bool = False  # whether its card has begun to make it
    watched: bool = False
    begun_at: float = 0.0  # since when it is watched (`backups.py`), in seconds, monotonic
