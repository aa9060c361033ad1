"""Which cards have captured which graphs, and when another capture is worth its cost.

A card prefers the graph keys that it has captured. Of others it takes the one with the most work per card that has
captured it, if any is worth a capture: if the card would be done before those that have captured it get to it. What a
capture costs shows in how much longer a card's first shard of a key takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from gaudi_batch.plan import GraphKey


class Affinity:
    """The graphs on all cards of a run, as far as the schedule can know them.

    Args:
        max_graphs: graph keys whose graphs a card keeps.
    """

    def __init__(self, max_graphs: int) -> None:
        self._max_graphs = max_graphs
        self._captured: dict[int, dict[GraphKey, None]] = {}  # by card; the latest used is the last
        self._cards_with: Counter[GraphKey] = Counter()
        self._warm_s = 0.0
        self._warm_images = 0
        # Of shards that captured a graph.
        self._cold_s = 0.0
        self._cold_images = 0
        self._cold_shards = 0

    def use(self, card: int, key: GraphKey) -> bool:
        """Notes that a card will have a key's graph; returns whether that is new to it.

        For one more than it keeps, the card gives up the least recently used.
        """
        keys = self._captured.setdefault(card, {})
        captures = key not in keys
        keys.pop(key, None)
        keys[key] = None
        self._cards_with[key] += captures
        if len(keys) > self._max_graphs:
            oldest = next(iter(keys))
            del keys[oldest]
            self._cards_with[oldest] -= 1
        return captures

    def captured(self, card: int) -> list[GraphKey]:
        """The keys whose graphs a card has or will have, the most recently used last."""
        return list(self._captured.get(card, ()))

    def forget(self, card: int) -> None:
        """Forgets the graphs of a card whose process is over."""
        self._cards_with.subtract(list(self._captured.pop(card, ())))

    def took(self, seconds: float, images: int, captured: bool) -> None:
        """Notes how long the pipeline calls of a shard took, and whether they captured a graph."""
        if captured:
            self._cold_s += seconds
            self._cold_images += images
            self._cold_shards += 1
        else:
            self._warm_s += seconds
            self._warm_images += images

    def choose(self, card: int, pending: Mapping[GraphKey, tuple[int, int]]) -> GraphKey | None:
        """The key that a card should go on with, or None if none is worth it.

        Args:
            card: which card.
            pending: for each key how many images are pending, and how many of them are of the next shard.
        """
        keys = self._captured.get(card, {})
        last = next(reversed(keys), None)
        if last in pending:
            return last
        captured = [key for key in keys if key in pending]
        if captured:
            return max(captured, key=lambda key: (pending[key][0], key))
        worthy = [key for key, (left, images) in pending.items() if self.is_worth_it(key, left, images)]
        return max(worthy, key=lambda key: (pending[key][0] / (1 + self._cards_with[key]), key), default=None)

    def is_worth_it(self, key: GraphKey, pending: int, images: int) -> bool:
        """Whether a card that captures this key would finish a shard of it before those that have captured it.

        Those share what is pending. What is in flight on them is left out: that keeps captures rarer at little cost.
        It is counted in images, since shards shrink towards the end of a plan. The answer is the same for every card.

        Args:
            key: the key.
            pending: how many images of it wait.
            images: of the next shard.
        """
        captured_by = self._cards_with[key]
        return not captured_by or self._capture_cost(images) + 1 <= -(-pending // (captured_by * max(1, images)))

    def _capture_cost(self, images: int) -> float:
        """The cost of a capture, in shards of so many images; 0 while it is unknown."""
        if not self._cold_shards or not self._warm_s or not images:
            return 0.0
        image_s = self._warm_s / max(1, self._warm_images)
        capture_s = (self._cold_s - image_s * self._cold_images) / self._cold_shards
        return max(0.0, capture_s / (image_s * images))
