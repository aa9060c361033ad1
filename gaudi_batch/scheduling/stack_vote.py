"""Which stack the cards of a driver are to have. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

STACK_VOTE_TIMEOUT_S = 60.0
"""How long the cards that differ may wait for the first record of one that works; a shard may take hours."""


class StackVote:
    """Which stack the cards of a driver are to have, so that one odd node costs that node alone.

    A card that has another waits. If any card has the stack that made the run's last images, that is it, for good. Else
    none works before all cards that the cluster has given have loaded or failed, and it is the one that most have. In a
    new run the first card works at once, and the others' word counts until the first record of one is there, or
    STACK_VOTE_TIMEOUT_S are over: as long as nothing is committed, a stack that more cards have takes its place.

    Args:
        before: what made the run's last images; None where that is not known.
    """

    def __init__(self, before: Mapping[str, str] | None) -> None:
        self.stack: Mapping[str, str] | None = None
        """That of the cards that work; None as long as none does."""
        self.settled = False
        """Whether it stays that, so that who differs has nothing to wait for."""
        self._before = before
        self._since = 0.0

    @property
    def expected(self) -> Mapping[str, str] | None:
        """What a card is compared with now."""
        return self._before if self.stack is None else self.stack

    def count(self, up: Sequence[Mapping[str, str]], coming: bool, now: float) -> None:
        """Decides anew.

        Args:
            up: the stack of each card that has loaded, of those that wait, too.
            coming: whether other cards are loading.
            now: seconds, monotonic.
        """
        if self.settled:
            return
        if self._before is not None and self._before in up:
            self.stack, self.settled = self._before, True
            return
        if self.stack is None:
            if not up or (self._before is not None and coming):
                return
            self.stack, self._since = up[0], now
        most = max(up, key=up.count, default=self.stack)
        if up.count(most) > up.count(self.stack):
            self.stack = most
        self.settled = now - self._since >= STACK_VOTE_TIMEOUT_S
