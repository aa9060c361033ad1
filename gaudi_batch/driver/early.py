"""Cards that start while the records of a resumed run are read. To read those of hundreds of thousands of shards takes
as long as a card's start, and neither needs the other."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from gaudi_batch.driver.run_context import Run
from gaudi_batch.text import counted

if TYPE_CHECKING:
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
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
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

    def start(self, count: int) -> None:
        """Connects, and has a thread start as many of the cards that the cluster has now, while this one goes on.

        Args:
            count: cards that are of use, at most.

        Raises:
            InputError: there is no cluster.
        """
        cards = self.connect()
        from gaudi_batch.cluster.connection import cluster_capacity

        config = self._run.job.config
        count = min(cluster_capacity(config, cards.resources).cards, config.max_cards or count, count)
        log.info("%s before all records of the run are read", counted(count, "card starts", "cards start"))
        self._thread = threading.Thread(target=self._start, args=(cards, count), name="early cards", daemon=True)
        self._thread.start()

    def connect(self) -> CardsOfRun:
        """The cards, which are not the caller's yet; connects to the cluster, if need be. Raises InputError."""
        if self._cards is None:
            resources = self._run.connect()
            # Ray is slow to import, and a run that is complete does not need it.
            from gaudi_batch.driver.places import CardsOfRun

            self._cards = CardsOfRun.of(self._run, resources)
        return self._cards

    def take(self) -> CardsOfRun:
        """The cards, which from now on are the caller's to give back."""
        self._taken = True
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        return self.connect()

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
