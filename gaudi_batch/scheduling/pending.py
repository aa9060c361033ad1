"""The shards that no card has. Pure, a part of the schedule."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from gaudi_batch.plan import BatchKind, GraphKey, Shard
from gaudi_batch.scheduling.fresh import FreshShards, Readers

FIRST_OF_KEY = 4
"""Shards of a graph key that have come back for which one event looks for a card."""
MAX_LOOKED_AT = 64
"""Of all graph keys."""


class Pending:
    """Three kinds of shards are pending: fresh ones, by graph key; those that come back, which go first; and suspect
    ones, which get a card of their own.

    Args:
        shards: all that are to be made, by number.
    """

    def __init__(self, shards: Mapping[int, Shard]) -> None:
        self._shards = shards
        self.suspects: dict[int, None] = {}
        self.node_suspects: dict[int, None] = {}
        """Shards that have to run alone on a node."""
        self._returned: dict[GraphKey, dict[int, None]] = {}
        self._parked: dict[int, None] = {}  # they wait for what another shard of their row group finds out
        self._images_back: Counter[GraphKey] = Counter()  # of all that are not fresh
        self.readers = Readers()
        self.fresh: dict[GraphKey, FreshShards] = {}
        self.fresh_images: dict[GraphKey, tuple[int, int]] = {}
        """For each key the images of all fresh shards, and of one of the next."""
        self._fresh_count = 0
        for number in sorted(shards):
            self.fresh.setdefault(shards[number].bucket.graph_key, FreshShards()).add(shards[number])
        for key in list(self.fresh):
            self._fresh_count += len(self.fresh[key])
            self._count(key)

    def __len__(self) -> int:
        return self.plain + len(self.suspects) + len(self.node_suspects) + len(self._parked)

    def numbers(self) -> list[int]:
        """The numbers of all pending shards."""
        fresh = [number for queue in self.fresh.values() for number in queue]
        return [*fresh, *self._all_returned(), *self.suspects, *self.node_suspects, *self._parked]

    @property
    def plain(self) -> int:
        """How many of them any card may take."""
        return sum(map(len, self._returned.values())) + self._fresh_count

    def images(self, key: GraphKey) -> int:
        """Images of all pending shards of a graph key."""
        fresh, _ = self.fresh_images.get(key, (0, 0))
        return fresh + self._images_back[key]

    def first_returned(self) -> Iterator[int]:
        """The first few shards that have come back, of each graph key: where no card is free for those of one key, one
        may be for those of another. That which came back last goes first."""
        firsts = (itertools.islice(reversed(shards), FIRST_OF_KEY) for shards in self._returned.values())
        return itertools.islice(itertools.chain.from_iterable(firsts), MAX_LOOKED_AT)

    def put_returned(self, shard: int) -> None:
        """Adds a shard that any card may have."""
        self._put(self._returned.setdefault(self._key(shard), {}), shard)

    def put_suspect(self, shard: int, *, alone_on_node: bool = False) -> None:
        """Adds a shard that gets a card, or a node, of its own."""
        self._put(self.node_suspects if alone_on_node else self.suspects, shard)

    def park(self, shard: int) -> None:
        """Adds a shard that waits for what another shard of its row group finds out."""
        self._put(self._parked, shard)

    def take_parked(self) -> list[int]:
        """Takes out all shards that wait for that, in order."""
        parked = sorted(self._parked)
        for shard in parked:
            self.take(shard)
        return parked

    def take_returned(self, chosen: Callable[[int], bool]) -> list[int]:
        """Takes out the shards of some kind that have come back, in order."""
        taken = sorted(shard for shard in self._all_returned() if chosen(shard))
        for shard in taken:
            self.take(shard)
        return taken

    def take_fresh(self, key: GraphKey, card: int) -> int:
        """The next fresh shard of a key for a card."""
        shard = self.fresh[key].take(card, self.readers)
        self._fresh_count -= 1
        self._count(key)
        return shard

    def take(self, shard: int) -> bool:
        """Takes out a shard that has come back; returns whether it was pending."""
        key = self._key(shard)
        for place in (self.suspects, self.node_suspects, self._parked, self._returned.get(key, {})):
            if shard in place:
                del place[shard]
                self._images_back[key] -= self._shards[shard].images
                if key in self._returned and not self._returned[key]:
                    del self._returned[key]
                return True
        return False

    def take_kind(self, kind: BatchKind) -> list[int]:
        """All pending shards of one kind of batch."""

        def is_kind(number: int) -> bool:
            return self._shards[number].bucket.batch_kind == kind

        key = GraphKey(kind.width, kind.height, kind.guided)
        taken: list[int] = []
        if key in self.fresh:
            taken += self.fresh[key].take_all(lambda shard: shard.bucket.batch_kind == kind)
            self._fresh_count -= len(taken)
            self._count(key)
        places: list[Iterable[int]] = [self._all_returned(), self.suspects, self.node_suspects, self._parked]
        back = [number for place in places for number in place if is_kind(number)]
        for number in back:
            self.take(number)
        return taken + back

    def _key(self, shard: int) -> GraphKey:
        return self._shards[shard].bucket.graph_key

    def _all_returned(self) -> list[int]:
        return [shard for shards in self._returned.values() for shard in reversed(shards)]

    def _put(self, place: dict[int, None], shard: int) -> None:
        place[shard] = None
        self._images_back[self._key(shard)] += self._shards[shard].images

    def _count(self, key: GraphKey) -> None:
        fresh = self.fresh[key]
        if fresh:
            self.fresh_images[key] = fresh.images, fresh.next_images
        else:
            del self.fresh[key]
            self.fresh_images.pop(key, None)
