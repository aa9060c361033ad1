"""The shards that no card has. Pure, a part of the schedule."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from gaudi_batch.plan import BatchKind, GraphKey, Shard
from gaudi_batch.scheduling.fresh import FreshShards, Readers


class Pending:
    """Three kinds of shards are pending: fresh ones, by graph key; those that come back, which go first; and suspect
    ones, which get a card of their own.

    Args:
        shards: all that are to be made, by number.
    """

    def __init__(self, shards: Mapping[int, Shard]) -> None:
        self._shards = shards
        self.returned: deque[int] = deque()
        self.suspects: dict[int, None] = {}
        self.node_suspects: dict[int, None] = {}
        """Shards that have to run alone on a node."""
        self.parked: dict[int, None] = {}
        """Shards that wait for what another shard of their row group finds out."""
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
        return self.plain + len(self.suspects) + len(self.node_suspects) + len(self.parked)

    def numbers(self) -> list[int]:
        """The numbers of all pending shards."""
        fresh = [number for queue in self.fresh.values() for number in queue]
        return [*fresh, *self.returned, *self.suspects, *self.node_suspects, *self.parked]

    @property
    def plain(self) -> int:
        """How many of them any card may take."""
        return len(self.returned) + self._fresh_count

    def take_fresh(self, key: GraphKey, card: int) -> int:
        """The next fresh shard of a key for a card."""
        shard = self.fresh[key].take(card, self.readers)
        self._fresh_count -= 1
        self._count(key)
        return shard

    def take(self, shard: int) -> bool:
        """Takes out a shard that has come back; returns whether it was pending."""
        for place in (self.suspects, self.node_suspects, self.parked):
            if shard in place:
                del place[shard]
                return True
        if shard in self.returned:
            self.returned.remove(shard)
            return True
        return False

    def take_kind(self, kind: BatchKind) -> list[int]:
        """All pending shards of one kind of batch."""

        def is_kind(number: int) -> bool:
            return self._shards[number].bucket.batch_kind == kind

        key = GraphKey(kind.width, kind.height, kind.guided)
        others = (self.suspects, self.node_suspects, self.parked)
        taken: list[int] = []
        if key in self.fresh:
            taken += self.fresh[key].take_all(lambda shard: shard.bucket.batch_kind == kind)
            self._fresh_count -= len(taken)
            self._count(key)
        places: list[Iterable[int]] = [self.returned, *others]
        taken += [number for place in places for number in place if is_kind(number)]
        self.returned = deque(number for number in self.returned if not is_kind(number))
        for number in taken:
            for place in others:
                place.pop(number, None)
        return taken

    def _count(self, key: GraphKey) -> None:
        fresh = self.fresh[key]
        if fresh:
            self.fresh_images[key] = fresh.images, fresh.next_images
        else:
            del self.fresh[key]
            self.fresh_images.pop(key, None)
