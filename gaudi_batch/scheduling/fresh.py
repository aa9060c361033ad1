"""The shards of a graph key that no card has tried, by row group. Pure, a part of the schedule.

A card decodes whole row groups, so it goes on in the one that it is at. When that has no shard left, it begins one in
which no card has been. Where there is none, it joins the cards of another: it looks at the row groups whose next shard
is the largest, and takes the one with the most shards left for each card in it.

Shards shrink towards the end of a row group, so that the cards finish together. A card therefore leaves its row group
before its end for one that has fallen behind, whose large shards would otherwise be made last.
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
MAX_LAG = 4
"""A row group has fallen behind where its next shard is more than so many times as large."""


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
        # Groups of which a shard was taken, by the images of their next one, in the order in which that was last done.
        self._begun: dict[int, dict[RowGroup, None]] = {}
        self._untouched: dict[RowGroup, None] = {}
        self._count = 0
        self.images = 0
        """Images of all of them."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Their numbers."""
        return (shard.number for queue in self._queues.values() for shard in queue)

    @property
    def next_images(self) -> int:
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
        self.images += shard.images

    def take(self, card: int, readers: Readers) -> int:
        """Takes out the next shard for a card; there has to be one."""
        group = self._choose(readers.group(card), readers)
        self._unfile(group)
        shard = self._queues[group].popleft()
        self._count -= 1
        self.images -= shard.images
        self._file(group)
        return shard.number

    def take_all(self, chosen: Callable[[Shard], bool]) -> list[int]:
        """Takes out all shards of a kind."""
        taken: list[Shard] = []
        for group, queue in list(self._queues.items()):
            is_untouched = group in self._untouched
            self._unfile(group)
            taken += [shard for shard in queue if chosen(shard)]
            self._queues[group] = deque(shard for shard in queue if not chosen(shard))
            self._file(group, is_untouched)
        self._count -= len(taken)
        self.images -= sum(shard.images for shard in taken)
        return [shard.number for shard in taken]

    def _choose(self, own: RowGroup | None, readers: Readers) -> RowGroup:
        largest = max(self._begun, default=0)
        if own in self._queues:
            queue = self._queues[own]
            if len(queue) == 1 or largest <= MAX_LAG * queue[0].images:
                return own
        elif self._untouched:
            return next(iter(self._untouched))
        groups = itertools.islice(self._begun[largest], COMPARED_GROUPS)
        return max(groups, key=lambda group: len(self._queues[group]) / (1 + readers.cards(group)))

    def _file(self, group: RowGroup, is_untouched: bool = False) -> None:
        queue = self._queues[group]
        if not queue:
            del self._queues[group]
        elif is_untouched:
            self._untouched[group] = None
        else:
            self._begun.setdefault(queue[0].images, {})[group] = None

    def _unfile(self, group: RowGroup) -> None:
        self._untouched.pop(group, None)
        images = self._queues[group][0].images
        if group in self._begun.get(images, {}):
            del self._begun[images][group]
            if not self._begun[images]:
                del self._begun[images]
