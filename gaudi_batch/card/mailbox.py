"""What a card's threads and the driver's calls share: events that are not acknowledged yet, and the card's present
state."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from gaudi_batch.card.messages import CardReport, CardStatus, Done, Dropped, Message
from gaudi_batch.card.readings import Readings
from gaudi_batch.card.work import CardWork
from gaudi_batch.plan import BatchKind
from gaudi_batch.scheduling.events import ShardFailed


class Mailbox:
    """Events and state of a card. The card's threads write, the driver's calls read.

    Args:
        storage_s: tells for how many seconds the oldest operation on storage has been going on.
        readings: tells what the card's counters say.
    """

    def __init__(self, storage_s: Callable[[], float], readings: Callable[[], Readings] = Readings) -> None:
        self._storage_s = storage_s
        self._readings = readings
        self._changed = threading.Condition()
        self._events: list[tuple[int, Message]] = []
        self._last_event = 0
        self._acknowledged = 0
        self._begun: set[str] = set()
        self._recalled: set[str] = set()
        self._dropped: set[str] = set()
        self._phase = "loading"
        self._phase_since = time.monotonic()
        self._images: Counter[str] = Counter()
        self._kind: BatchKind | None = None
        self._reading_since: float | None = None
        self._shard: int | None = None
        self._rows: tuple[int, ...] = ()
        self._reading_shard: int | None = None
        self._storing = 0
        self._storing_since = 0.0
        self._batch_s: dict[BatchKind, float] = {}
        self._warmup_s: dict[BatchKind, float] = {}
        self._work = CardWork()

    def emit(self, event: Message) -> int:
        """Adds an event for the driver and returns its number."""
        with self._changed:
            self._last_event += 1
            self._events.append((self._last_event, event))
            if isinstance(event, (Done, Dropped, ShardFailed)):
                self._images.pop(event.attempt, None)
            self._changed.notify_all()
            return self._last_event

    def poll(self, acknowledged: int, timeout_s: float) -> CardReport:
        """Drops acknowledged events and waits up to `timeout_s` seconds for others."""
        with self._changed:
            self._acknowledged = acknowledged
            self._events = [(number, event) for number, event in self._events if number > acknowledged]
            self._changed.notify_all()
            self._changed.wait_for(lambda: bool(self._events), timeout_s)
            now = time.monotonic()
            status = CardStatus(
                phase=self._phase,
                phase_s=now - self._phase_since,
                storage_s=self._storage_s(),
                images=sum(self._images.values()),
                kind=self._kind,
                reading_s=0.0 if self._reading_since is None else now - self._reading_since,
                batch_s=dict(self._batch_s),
                warmup_s=dict(self._warmup_s),
                shard=self._shard,
                rows=self._rows,
                reading_shard=self._reading_shard,
                storing=self._storing,
                storing_s=now - self._storing_since if self._storing else 0.0,
                work=self._work,
                readings=self._readings(),
                images_of=dict(self._images),
            )
            return CardReport(tuple(self._events), status)

    def wait_for_acknowledgement(self, number: int) -> None:
        """Waits until the driver has acknowledged an event."""
        with self._changed:
            self._changed.wait_for(lambda: self._acknowledged >= number)

    def begin(self, attempt: str) -> bool:
        """Begins an attempt, unless it was given back or is to be dropped."""
        with self._changed:
            if attempt in self._recalled or attempt in self._dropped:
                return False
            self._begun.add(attempt)
            return True

    def recall(self, attempt: str) -> bool:
        """Gives an attempt back, unless it has begun."""
        with self._changed:
            if attempt in self._begun:
                return False
            self._recalled.add(attempt)
            return True

    def drop(self, attempt: str) -> None:
        """Notes that an attempt is to be ended."""
        with self._changed:
            self._dropped.add(attempt)
            self._images.pop(attempt, None)
            if attempt in self._recalled:
                self.emit(Dropped(attempt))  # the card's threads may have passed it by

    def is_dropped(self, attempt: str) -> bool:
        """Whether an attempt is to be ended."""
        return attempt in self._dropped

    def enter(
        self, phase: str, kind: BatchKind | None = None, shard: int | None = None, rows: tuple[int, ...] = ()
    ) -> None:
        """Notes that the device begins something else; a batch has a kind, a shard and rows."""
        with self._changed:
            self._phase, self._phase_since, self._kind = phase, time.monotonic(), kind
            self._shard, self._rows = shard, rows

    def batch_took(self, kind: BatchKind, seconds: float, warmup: bool, wait_s: float = 0.0) -> None:
        """Notes how long a batch took; `warmup` says whether it was one of the first of its graph key, `wait_s` for how
        long the device was idle before."""
        with self._changed:
            self._work = self._work.with_batch("warmup" if warmup else "steady", seconds, wait_s)
            if warmup:
                self._warmup_s[kind] = min(seconds, self._warmup_s.get(kind, seconds))
            else:
                self._batch_s[kind] = max(seconds, self._batch_s.get(kind, 0.0))

    @contextlib.contextmanager
    def reading(self, shard: int) -> Iterator[None]:
        """Notes, while it is entered, that the rows of a shard are being read."""
        with self._changed:
            self._reading_since, self._reading_shard = time.monotonic(), shard
        try:
            yield
        finally:
            with self._changed:
                self._reading_since = self._reading_shard = None

    def store(self, images: int) -> None:
        """Counts images that wait to be stored; negative if they no longer do."""
        with self._changed:
            self._storing += images
            self._storing_since = time.monotonic()

    def stored(self, attempt: str, images: int) -> None:
        """Counts images of an attempt that are in storage."""
        with self._changed:
            self._work = self._work.with_images(images)
            if attempt not in self._dropped:
                self._images[attempt] += images
