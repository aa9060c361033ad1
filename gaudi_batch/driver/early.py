"""Cards that start before the driver knows what they are to make: those of a new run while the lease settles and the
plan is made, those of a resumed run while its records are read. To read the records of hundreds of thousands of shards
takes as long as a card's start, and neither needs the other."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gaudi_batch.errors import RunStopped
from gaudi_batch.job import Job
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted

if TYPE_CHECKING:
    from gaudi_batch.cluster.connection import CardResources
    from gaudi_batch.driver.places import CardsOfRun

log = logging.getLogger(__name__)

MIN_PLACE_INTERVAL_S, MAX_PLACE_INTERVAL_S = 0.1, 2.0
"""Seconds between two questions which cards have their places; the pause doubles each time."""
ANSWER_TIMEOUT_S = 120.0
"""Seconds that Ray may take to answer a question about cards."""
CLOSE_TIMEOUT_S = 30.0
"""Seconds that Ray may take to take back cards that nobody has taken."""


class EarlyCards:
    """Cards of a run from when it is likely that shards are missing. They are given back at its end, unless the driver
    has taken them.

    Args:
        job: the job.
        storage: the output.
        driver: prefix of this driver's attempts.
        connect: connects to the cluster; returns what a card takes of it.
    """

    def __init__(self, job: Job, storage: Storage, driver: str, connect: Callable[[], CardResources]) -> None:
        self._job, self._storage, self._driver, self._connect = job, storage, driver, connect
        self._started: _Started | None = None

    def __enter__(self) -> EarlyCards:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def start(self, run_id: str, count: int, before: str) -> None:
        """Connects, and has a thread start as many of the cards that the cluster has now, while this one goes on.
        Those that were started before are given back.

        Args:
            run_id: of the run.
            count: cards that are of use, as far as that is known.
            before: what they do not wait for, for the log.

        Raises:
            InputError: there is no cluster.
        """
        self.give_back()
        resources = self._connect()
        from gaudi_batch.cluster.connection import cluster_capacity

        config = self._job.config
        count = min(cluster_capacity(config, resources).cards, config.max_cards or count, count)
        if count:
            log.info("%s before %s", counted(count, "card starts", "cards start"), before)
            self._started = _Started(self._cards_of(run_id), count)

    def settle(self) -> None:
        """Has the thread start no more cards, and waits until it does not. Raises RunStopped if Ray does not answer
        it."""
        if self._started is not None:
            self._started.settle()

    def take(self, run_id: str) -> CardsOfRun:
        """The cards of a run, which from now on are the caller's to give back. Raises InputError."""
        started = self._started
        if started is None or started.cards.setup.run_id != run_id:
            self.give_back()
            return self._cards_of(run_id)
        self._started = None
        started.let_go()
        return started.cards

    def give_back(self) -> None:
        """Gives all cards back that nobody has taken."""
        started, self._started = self._started, None
        if started is not None:
            started.give_back()

    def _cards_of(self, run_id: str) -> CardsOfRun:
        # Ray is slow to import, and a run that is complete does not need it.
        from gaudi_batch.card.messages import CardSetup
        from gaudi_batch.driver.places import CardsOfRun

        setup = CardSetup(self._job, self._storage, run_id, self._driver)
        return CardsOfRun.of(setup, self._connect())


class _Started:
    """Cards that a thread starts, and gives back if it is told to.

    Args:
        cards: the cards of the run.
        count: how many of them.
    """

    def __init__(self, cards: CardsOfRun, count: int) -> None:
        self.cards = cards
        self._count = count
        self._enough = threading.Event()
        self._settled = threading.Event()
        self._decided = threading.Event()
        self._given_back = False
        self._thread = threading.Thread(target=self._run, name="early cards", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        self._enough.set()
        if not self._settled.wait(ANSWER_TIMEOUT_S):
            raise RunStopped(f"stopped: Ray has not answered for {ANSWER_TIMEOUT_S:.0f} s; the same command resumes")

    def let_go(self) -> None:
        self._enough.set()
        self._decided.set()
        self._thread.join()

    def give_back(self) -> None:
        self._given_back = True
        self._enough.set()
        self._decided.set()
        until = time.monotonic() + CLOSE_TIMEOUT_S
        interrupted = False
        while self._thread.is_alive() and time.monotonic() < until:
            try:
                self._thread.join(max(0.0, until - time.monotonic()))
            except KeyboardInterrupt:  # Ray must not be left while the thread asks it
                interrupted = True
        if interrupted:
            raise KeyboardInterrupt

    def _run(self) -> None:
        places, unplaced, pause = self.cards.places, set(range(self._count)), MIN_PLACE_INTERVAL_S
        try:
            places.create_early(unplaced)
            while unplaced and not self._enough.wait(pause):
                for number in places.placed(unplaced):
                    places.start(number)
                    unplaced.discard(number)
                pause = min(2 * pause, MAX_PLACE_INTERVAL_S)
        except Exception as error:
            log.debug("cards do not start early: %s", error)  # the driver tries again, and says what fails
        finally:
            self._settled.set()
            self._decided.wait()
            if self._given_back:
                places.close()
