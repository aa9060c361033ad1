"""Cards that start before the driver knows what they are to make: those of a new run while the lease settles and the
plan is made, those of a resumed run while its records are read. To read the records of hundreds of thousands of shards
takes as long as a card's start, and neither needs the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from gaudi_batch.job import Job
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted

if TYPE_CHECKING:
    from gaudi_batch.cluster.connection import CardResources
    from gaudi_batch.driver.places import CardsOfRun

log = logging.getLogger(__name__)

MIN_PLACE_INTERVAL_S, MAX_PLACE_INTERVAL_S = 0.1, 2.0
"""Seconds between two questions which cards have their places; the pause doubles each time."""
CLOSE_TIMEOUT_S = 30.0
"""Seconds that Ray may take to take back cards that nobody has taken."""


class EarlyCards:
    """The cards of a run from when it is known that shards are missing. They are given back at its end, unless the
    driver has taken them.

    Args:
        job: the job.
        storage: the output.
        driver: prefix of this driver's attempts.
        connect: connects to the cluster; returns what a card takes of it.
    """

    def __init__(self, job: Job, storage: Storage, driver: str, connect: Callable[[], CardResources]) -> None:
        self._job, self._storage, self._driver, self._connect = job, storage, driver, connect
        self._cards: CardsOfRun | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._taken = False

    def __enter__(self) -> EarlyCards:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def start(self, run_id: str, count: int, before: str) -> None:
        """Connects, and has a thread start as many of the cards that the cluster has now, while this one goes on.

        Args:
            run_id: of the run.
            count: cards that are of use, at most.
            before: what they do not wait for, for the log.

        Raises:
            InputError: there is no cluster.
        """
        resources = self._connect()
        from gaudi_batch.cluster.connection import cluster_capacity

        config = self._job.config
        count = min(cluster_capacity(config, resources).cards, config.max_cards or count, count)
        log.info("%s before %s", counted(count, "card starts", "cards start"), before)
        self._cards = self._cards_of(run_id)
        self._thread = threading.Thread(target=self._start, args=(self._cards, count), name="early cards", daemon=True)
        self._thread.start()

    def take(self, run_id: str) -> CardsOfRun:
        """The cards of a run, which from now on are the caller's to give back. Raises InputError."""
        self._taken = self._cards is not None and self._cards.setup.run_id == run_id
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        return self._cards if self._cards is not None and self._taken else self._cards_of(run_id)

    def _cards_of(self, run_id: str) -> CardsOfRun:
        # Ray is slow to import, and a run that is complete does not need it.
        from gaudi_batch.card.messages import CardSetup
        from gaudi_batch.driver.places import CardsOfRun

        setup = CardSetup(self._job, self._storage, run_id, self._driver)
        return CardsOfRun.of(setup, self._connect())

    def _start(self, cards: CardsOfRun, count: int) -> None:
        from ray.exceptions import RayError

        places, unplaced, pause = cards.places, set(range(count)), MIN_PLACE_INTERVAL_S
        try:
            places.create_early(unplaced)
            while unplaced and not self._over.wait(pause):
                for number in places.placed(unplaced):
                    places.start(number)
                    unplaced.discard(number)
                pause = min(2 * pause, MAX_PLACE_INTERVAL_S)
        except RayError as error:
            log.debug("cards do not start early: %s", error)  # the driver tries again, and says what fails
        finally:
            self._over.wait()
            if not self._taken:
                places.close()
