"""Which stack all cards of a driver must have. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

STACK_VOTE_TIMEOUT_S = 60.0
"""Seconds that cards with another stack wait for the first record of one that works; a shard may take hours."""


class Stack(Mapping[str, str]):
    """The versions and settings that shape a card's images, by name. Stacks compare and hash by their content."""

    def __init__(self, versions: Mapping[str, str]) -> None:
        self._versions = dict(versions)
        self._key = frozenset(self._versions.items())

    def __getitem__(self, name: str) -> str:
        return self._versions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._versions)

    def __len__(self) -> int:
        return len(self._versions)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self._key == other._key


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """How two stacks differ: each name with its value in the first and in the second."""
    names = sorted(one.keys() | other.keys())
    pairs = [(name, one.get(name, "missing"), other.get(name, "missing")) for name in names]
    return [(name, here, there_is) for name, here, there_is in pairs if here != there_is]


class StackVote:
    """Which stack the cards of a driver are to have, so that one odd node costs that node alone.

    A card that has another waits. If any card has the stack that made the run's last images, that is it, for good. Else
    none works before all cards that the cluster has given have loaded or failed, and it is the one that most have. In a
    new run the first card works at once. The other cards' stacks count until a card has made the first record, or
    STACK_VOTE_TIMEOUT_S are over: as long as nothing is committed, a stack that more cards have takes its place.

    Args:
        before: what made the run's last images; None where that is not known.
    """

    def __init__(self, before: Mapping[str, str] | None) -> None:
        self.stack: Stack | None = None
        """The stack of the cards that work; None as long as none works."""
        self.settled = False
        """Whether that is final, so that a card with another stack has nothing to wait for."""
        self._before = None if before is None else Stack(before)
        self._since = 0.0

    @property
    def expected(self) -> Stack | None:
        """The stack that a card is compared with now."""
        return self._before if self.stack is None else self.stack

    def count(self, stacks: Mapping[Stack, int], coming: bool, now: float) -> None:
        """Counts again and decides.

        Args:
            stacks: how many of the cards that have loaded have each stack, those that wait among them.
            coming: whether other cards are loading.
            now: seconds, monotonic.
        """
        if self.settled:
            return
        if self._before is not None and self._before in stacks:
            self.stack, self.settled = self._before, True
            return
        if self.stack is None:
            if not stacks or (self._before is not None and coming):
                return
            self.stack, self._since = next(iter(stacks)), now
        most = max(stacks, key=lambda stack: stacks[stack], default=self.stack)
        if stacks.get(most, 0) > stacks.get(self.stack, 0):
            self.stack = most
        self.settled = now - self._since >= STACK_VOTE_TIMEOUT_S
