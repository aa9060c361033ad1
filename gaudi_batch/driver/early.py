"""Cards that start while the records of a resumed run are read. To read those of hundreds of thousands of shards takes
as long as a card's start, and neither needs the other."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from gaudi_batch.driver.run_context import Run

if TYPE_CHECKING:
    from gaudi_batch.driver.places import CardsOfRun

PLACE_INTERVAL_S = 0.1
"""Seconds between two questions which cards have their places."""


class EarlyCards:
    """The cards of a run from when it is known that shards are missing; gives them back at its end, unless the driver
    has taken them.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._cards: CardsOfRun | None = None

    def __enter__(self) -> EarlyCards:
        return self

    def __exit__(self, *_: object) -> None:
        if self._cards is not None:
            self._cards.places.close()

    def read_commits(self, *, start_cards: bool) -> None:
        """Reads what is committed of the run. Storage lists the manifests first: if these are fewer than the plan has
        shards, cards start while the manifests are read.

        Args:
            start_cards: whether they may.

        Raises:
            InputError: there is no cluster.
            LeaseLost: another driver has taken over.
            StorageError: storage failed for longer than `storage_patience`.
        """
        run = self._run
        listed = run.ledger.manifest_entries()
        missing = len(run.plan) - len(listed)
        if not (start_cards and listed and missing > 0):
            run.commits.refresh(listed)
            return
        pool = ThreadPoolExecutor(1, "read commits")
        reading = pool.submit(run.commits.refresh, listed)
        pool.shutdown(wait=False)  # a signal to stop does not wait for it
        self._start(missing, reading)
        reading.result()

    def take(self) -> CardsOfRun:
        """The cards, which from now on are the caller's to give back; connects to the cluster, if need be."""
        cards, self._cards = self._cards or self._connect(), None
        return cards

    def _connect(self) -> CardsOfRun:
        resources = self._run.connect()
        # Ray is slow to import, and a run that is complete does not need it.
        from gaudi_batch.driver.places import CardsOfRun

        return CardsOfRun.of(self._run, resources)

    def _start(self, missing: int, reading: Future[None]) -> None:
        """Starts the cards that the cluster has now, one for each missing shard at most, until the reading is over."""
        cards = self._cards = self._connect()
        from gaudi_batch.cluster.connection import cluster_capacity

        config = self._run.job.config
        count = min(cluster_capacity(config, cards.resources).cards, config.max_cards or missing, missing)
        unplaced = set(range(count))
        cards.places.create_early(unplaced)
        while unplaced and not reading.done():
            for number in cards.places.placed(unplaced):
                cards.places.start(number)
                unplaced.discard(number)
            wait([reading], PLACE_INTERVAL_S)
