"""Which cards have captured which graphs, and when another capture is worth its cost.

A card prefers the graph keys that it has captured. Of others it takes the one with the most work per card that has
captured it, if any is worth a capture: if the card would be done before those that have captured it get to it. It also
leaves a key with work for one that would be done so much later that the run ends sooner in spite of the capture. What a
capture costs shows in how much longer a card's first shard of a key takes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

from gaudi_batch.plan import GraphKey

MAX_COMPARED_KEYS = 64
"""Graph keys among which a card looks for one that is late."""
MAX_SHARE = 0.9
"""A card leaves its key if the later of two keys then ends in less than this share of the time that it takes now."""


class Affinity:
    """The graphs on all cards of a run, as far as the schedule can know them.

    Args:
        max_graphs: graph keys whose graphs a card keeps.
    """

    def __init__(self, max_graphs: int) -> None:
        self._max_graphs = max_graphs
        self._captured: dict[int, dict[GraphKey, None]] = {}  # by card; the latest used is the last
        self._cards_with: Counter[GraphKey] = Counter()
        self._choices = 0
        self._cards_at: Counter[GraphKey] = Counter()  # by the key that a card used last
        self._warm_s = 0.0
        self._warm_images = 0
        # How long images of a key take, and shards that captured a graph, each by key.
        self._warm_of: dict[GraphKey, tuple[float, int]] = {}
        self._image_s: dict[GraphKey, float] = {}
        self._cold_of: dict[GraphKey, tuple[float, int, int]] = {}  # seconds, images, shards
        # What captures took, over the keys of which both kinds of shards were made.
        self._captures_s: dict[GraphKey, float] = {}
        self._all_captures_s = 0.0
        self._captures = 0
        self._capture_s = 0.0
        """Seconds of a capture; 0 while that is unknown."""
        self._capture_images = 0.0
        """Images that a card makes in that time."""

    def use(self, card: int, key: GraphKey) -> bool:
        """Notes that a card will have a key's graph; returns whether that is new to it.

        For one more than it keeps, the card gives up the least recently used.
        """
        keys = self._captured.setdefault(card, {})
        captures = key not in keys
        if keys:
            self._cards_at[next(reversed(keys))] -= 1
        self._cards_at[key] += 1
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
        keys = list(self._captured.pop(card, ()))
        self._cards_with.subtract(keys)
        self._cards_at.subtract(keys[-1:])

    def took(self, key: GraphKey, seconds: float, images: int, captured: bool) -> None:
        """Notes how long the pipeline calls of a shard took, and whether they captured a graph."""
        if captured:
            cold_s, cold_images, shards = self._cold_of.get(key, (0.0, 0, 0))
            self._cold_of[key] = cold_s + seconds, cold_images + images, shards + 1
        else:
            self._warm_s += seconds
            self._warm_images += images
            warm_s, warm_images = self._warm_of.get(key, (0.0, 0))
            self._warm_of[key] = warm_s + seconds, warm_images + images
            self._image_s[key] = (warm_s + seconds) / max(1, warm_images + images)
        if key in self._cold_of and key in self._image_s:
            self._note_captures(key, captured)

    def _note_captures(self, key: GraphKey, is_new: bool) -> None:
        """Notes what the captures of a key have taken beyond the time of their images."""
        cold_s, cold_images, shards = self._cold_of[key]
        captures_s = cold_s - self._image_s[key] * cold_images
        if key not in self._captures_s:
            self._captures += shards
        elif is_new:
            self._captures += 1
        self._all_captures_s += captures_s - self._captures_s.get(key, 0.0)
        self._captures_s[key] = captures_s
        self._capture_s = max(0.0, self._all_captures_s / self._captures)
        image_s = self._warm_s / max(1, self._warm_images)
        self._capture_images = self._capture_s / image_s if image_s else 0.0

    def choose(self, card: int, pending: Mapping[GraphKey, tuple[int, int]]) -> GraphKey | None:
        """The key that a card should go on with, or None if none is worth it.

        Args:
            card: which card.
            pending: for each key how many images are pending, and how many of them are of the next shard.
        """
        keys = self._captured.get(card, {})
        last = next(reversed(keys), None)
        if last is not None and last in pending:
            # One choice in so many as there are keys, so that a choice costs no more where there are many.
            self._choices += 1
            return (self._choices % len(pending) == 0 and self._late_key(last, pending)) or last
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
        captured_by, images = self._cards_with[key], images or 1
        return not captured_by or self._capture_images / images + 1 <= -(-pending // (captured_by * images))

    def _late_key(self, key: GraphKey, pending: Mapping[GraphKey, tuple[int, int]]) -> GraphKey | None:
        """A key for which a card should leave its own, which has work: the run ends sooner.

        Args:
            key: of the card.
            pending: as for `choose`.
        """
        cards = self._cards_at[key]
        if len(pending) == 1 or cards < 2 or not self._captures or key not in self._image_s:
            return None
        late, late_s = key, 0.0
        for other in itertools.islice(pending, MAX_COMPARED_KEYS):
            at_other = self._cards_at[other]
            seconds = pending[other][0] * self._image_s.get(other, 0.0) / at_other if at_other else 0.0
            if seconds > late_s:
                late, late_s = other, seconds
        if late == key:
            return None
        at_late, capture_s = self._cards_at[late], self._capture_s
        late_work_s, own_work_s = late_s * at_late, pending[key][0] * self._image_s[key]
        with_it_s = (late_work_s + capture_s) / (at_late + 1)
        without_it_s = own_work_s / (cards - 1)
        # Cards that are done with their key go to the late one by themselves, as far as that is worth a capture.
        by_themselves_s = (late_work_s + own_work_s + cards * capture_s) / (at_late + cards)
        end_s = max(with_it_s, without_it_s)
        ends_sooner = end_s < MAX_SHARE * late_s and end_s < by_themselves_s
        return late if ends_sooner and capture_s < with_it_s else None
