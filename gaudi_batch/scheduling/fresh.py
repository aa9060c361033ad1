"""The shards of a graph key that no card has tried, by row group. Pure, a part of the schedule.

A card decodes whole row groups, so it goes on in the one that it is at while that has shards. After that it begins one
in which no card has been, and where there is none it joins the cards of another: of that which has the most shards left
for each card in it.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator

from gaudi_batch.plan import Shard

RowGroup = tuple[int, int]
"""Index of a file, and number of the row group in it."""
COMPARED_GROUPS = 64
"""Row groups among which a card chooses one to join."""


class Readers:
    """The row group that each card is at, by what it was last given."""

    def __init__(self) -> None:
        self._groups: dict[int, RowGroup] = {}
        self._cards: Counter[RowGroup] = Counter()

    def move(self, card: int, group: RowGroup) -> None:
        """Notes that a card reads a row group from now on."""
        self.forget(card)
        self._groups[card] = group
        self._cards[group] += 1

    def forget(self, card: int) -> None:
        """Forgets a card whose process is over."""
        group = self._groups.pop(card, None)
        if group is not None:
            self._cards[group] -= 1
            if not self._cards[group]:
                del self._cards[group]

    def group(self, card: int) -> RowGroup | None:
        """Where a card is."""
        return self._groups.get(card)

    def cards(self, group: RowGroup) -> int:
        """How many cards are at a row group."""
        return self._cards[group]


class FreshShards:
    """The fresh shards of one graph key."""

    def __init__(self) -> None:
        self._queues: dict[RowGroup, deque[Shard]] = {}
        self._begun: dict[
            RowGroup, None
        ] = {}  # groups of which a shard was taken, the one that was joined last at the end
        self._untouched: dict[RowGroup, None] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Their numbers."""
        return (shard.number for queue in self._queues.values() for shard in queue)

    @property
    def images(self) -> int:
        """Images of one of the next shards; there has to be one."""
        return next(iter(self._queues.values()))[0].images

    def add(self, shard: Shard) -> None:
        """Adds a shard, behind all others of its row group."""
        group = shard.file, shard.group
        if group not in self._queues:
            self._queues[group] = deque()
            self._untouched[group] = None
        self._queues[group].append(shard)
        self._count += 1

    def take(self, card: int, readers: Readers) -> int:
        """Takes out the next shard for a card; there has to be one."""
        own = readers.group(card)
        group = own if own in self._queues else self._choose(readers)
        assert group is not None
        queue = self._queues[group]
        shard = queue.popleft()
        self._count -= 1
        self._untouched.pop(group, None)
        self._begun[group] = None
        if not queue:
            self._drop(group)
        return shard.number

    def take_all(self, chosen: Callable[[Shard], bool]) -> list[int]:
        """Takes out all shards of a kind."""
        taken: list[int] = []
        for group, queue in list(self._queues.items()):
            taken += [shard.number for shard in queue if chosen(shard)]
            self._queues[group] = deque(shard for shard in queue if not chosen(shard))
            if not self._queues[group]:
                self._drop(group)
        self._count -= len(taken)
        return taken

    def _choose(self, readers: Readers) -> RowGroup:
        if self._untouched:
            return next(iter(self._untouched))
        groups = itertools.islice(self._begun, COMPARED_GROUPS)
        chosen = max(groups, key=lambda group: len(self._queues[group]) / (1 + readers.cards(group)))
        del self._begun[chosen]  # and it comes back as the last, so that all are looked at
        return chosen

    def _drop(self, group: RowGroup) -> None:
        del self._queues[group]
        self._begun.pop(group, None)
        self._untouched.pop(group, None)
