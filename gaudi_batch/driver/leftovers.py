"""Files of attempts that were not committed, which are removed at the end of a run.

A driver knows its own attempts by name. Those of drivers that are over must be listed, which takes as long as to list
all images, so a thread does that while the run goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping

from gaudi_batch.errors import StorageError
from gaudi_batch.layout import TIMELINE, attempt_name, driver_of, drivers_of_timeline, throughput_path
from gaudi_batch.output.cleanup import Left, left_by_attempts, remove_left
from gaudi_batch.output.formats import images_of
from gaudi_batch.output.formats.base import Attempt
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import FILES

log = logging.getLogger(__name__)

QUIET_S = 60.0
"""Seconds after which no process that a driver has left writes any more: their cards end with it."""


class Leftovers:
    """What attempts have left in an output.

    Args:
        ledger: of the run.
        driver: this one.
        past: the drivers before it that the lease names.
        committed: returns the attempt that is committed of a shard, if there is one.
        output_format: how images are kept.
    """

    def __init__(
        self,
        ledger: Ledger,
        driver: str,
        past: Collection[str],
        committed: Callable[[int], str | None],
        output_format: str = FILES,
    ) -> None:
        self._ledger, self._driver, self._committed = ledger, driver, committed
        self._format = output_format
        self._past = set(past)
        self._own: dict[str, tuple[int, str]] = {}
        self._probes: set[tuple[int, str]] = set()
        self._left_by_past: list[Left] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._list_later, name="leftovers", daemon=True)

    @property
    def drivers(self) -> list[str]:
        """The drivers that have begun on this output, this one among them, as far as that is known."""
        return [self._driver, *self._past]

    def begun(self, attempt: str, shard: int, card: str) -> None:
        """Notes an attempt of this driver."""
        self._own[attempt] = shard, card

    def settled(self, attempt: str) -> None:
        """Notes that an attempt of this driver has left nothing, or is committed."""
        self._own.pop(attempt, None)

    def probed(self, attempt: str, shard: int) -> None:
        """Notes that a probe of storage is written as if by an attempt at a shard."""
        self._probes.add((shard, attempt))

    def list_meanwhile(self) -> None:
        """Has a thread look for what the drivers before this one have left. Raises StorageError."""
        self._learn_past()
        if self._past:
            self._thread.start()

    def close(self) -> None:
        """Ends the thread's wait."""
        self._over.set()

    def _learn_past(self) -> bool:
        """Adds the drivers that have begun on this output, also those that no lease names: two may have taken it at the
        same moment, or it was lost. Returns whether there are more than before."""
        begun = drivers_of_timeline(self._ledger.storage.names(TIMELINE)) - {self._driver} - self._past
        self._past |= begun
        return bool(begun)

    def remove(self, committed: Mapping[int, str], in_doubt: Collection[str], *, is_complete: bool) -> None:
        """Removes the files of attempts that were not committed.

        Args:
            committed: the attempt of each committed shard.
            in_doubt: attempts that may still be committed.
            is_complete: whether every shard is committed. Only then are files of a driver that counts as dead safe to
                remove.

        Raises:
            LeaseLost: another driver has taken over.
            StorageError: storage failed.
        """
        left = [Left(f"images/{attempt_name(*probe)}", *probe) for probe in self._probes]
        for attempt, (shard, card) in self._own.items():
            left.append(Left(images_of(self._format, Attempt(shard, attempt)), shard, attempt))
            left.append(Left(throughput_path(card, shard, attempt), shard, attempt))
        if is_complete:
            left += self._of_past_drivers()
        remove_left(self._ledger, [each for each in left if each.attempt not in in_doubt], committed)

    def _of_past_drivers(self) -> list[Left]:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._learn_past() or (self._left_by_past is None and self._past):
            self._left_by_past = self._list()
        return self._left_by_past or []

    def _list_later(self) -> None:
        if self._over.wait(QUIET_S):
            return
        try:
            self._left_by_past = self._list()
        except StorageError as error:
            log.debug("what earlier drivers have left is listed at the end: %s", error)

    def _list(self) -> list[Left]:
        return [
            left
            for left in left_by_attempts(self._ledger.storage)
            if driver_of(left.attempt) in self._past and self._committed(left.shard) != left.attempt
        ]
