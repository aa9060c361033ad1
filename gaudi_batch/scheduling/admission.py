"""Which cards that have loaded may work. Pure, a part of the schedule.

All images of a run are to be the same whoever makes them, so all cards of a driver have one stack (`StackVote`), the
job's model, and as many CPUs as its threads. A module that Ray gives to two processes has one card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gaudi_batch.scheduling.cards import Card, CardState
from gaudi_batch.scheduling.decisions import Decision, HoldBack, UseStack
from gaudi_batch.scheduling.events import LoadedCard
from gaudi_batch.scheduling.stack_vote import Stack, StackVote, differences

SHOWN_DIGITS = 12
"""Digits of a model's SHA-256 or commit that messages show."""


@dataclass(frozen=True)
class Requirements:
    """What a card must have to make images of this run."""

    model: str = ""
    """The job's model, by name."""
    revision: str | None = None
    """The model's commit or SHA-256; None if any will do."""
    threads: int | None = None
    """Threads of a card, on which the images depend; None if they do not."""
    min_cpus: int = 0
    """CPUs that a card's process must be able to use."""
    stack: Mapping[str, str] | None = None
    """The stack that made the run's last images; None if unknown."""

    def why_unfit(self, loaded: LoadedCard, stack: Mapping[str, str]) -> str:
        """Why a card may not work; empty if it may.

        Args:
            loaded: what the card says of itself.
            stack: what the cards of the run have.
        """
        unlike = differences(loaded.stack, stack)
        if self.revision is not None and loaded.model != self.revision:
            unlike.append((f"model {self.model}", loaded.model[:SHOWN_DIGITS], self.revision[:SHOWN_DIGITS]))
        if unlike:
            listed = "; ".join(f"{name} is {here}, and {run_value} in this run" for name, here, run_value in unlike)
            return f"node {loaded.node} would make other images: {listed}; every node needs the same"
        if loaded.cpus < self.min_cpus:
            return (
                f"node {loaded.node} may use {loaded.cpus} CPUs (affinity, cgroup), and a card of this run has"
                f" {self.threads} threads, on which images depend; give the node as many, or take it out of the cluster"
            )
        return ""


@dataclass(frozen=True)
class Verdict:
    """Whether a card that has loaded may work."""

    card: Card
    refusal: str = ""
    """Why it may not work; empty if it may."""


class Admission:
    """The cards that have loaded and live: those that work, and those that wait.

    Args:
        requirements: what a card must have.
    """

    def __init__(self, requirements: Requirements) -> None:
        self._requirements = requirements
        self._vote = StackVote(requirements.stack)
        self._loaded: dict[int, Card] = {}
        self._stacks: Counter[Stack] = Counter()
        self._card_of_module: dict[tuple[str, int], Card] = {}  # of the modules of a node
        self._unadmitted: set[int] = set()  # loaded and not admitted yet
        self._judged: tuple[Stack | None, bool] = (None, False)  # what the last verdicts were based on

    def card_on_module_of(self, loaded: LoadedCard) -> Card | None:
        """The card that holds the same module, which Ray has given out twice."""
        return None if loaded.module is None else self._card_of_module.get((loaded.node_id, loaded.module))

    def why_unfit(self, loaded: LoadedCard) -> str:
        """Why a card can't work whatever stack the others have; empty if it may."""
        return self._requirements.why_unfit(loaded, loaded.stack)

    def add(self, card: Card, loaded: LoadedCard) -> None:
        """Notes that a card's process has loaded."""
        card.loaded = loaded
        self._loaded[card.number] = card
        self._unadmitted.add(card.number)
        self._stacks[Stack(loaded.stack)] += 1
        if loaded.module is not None:
            self._card_of_module[loaded.node_id, loaded.module] = card

    def remove(self, card: Card) -> None:
        """Forgets a card: its process has ended, or it may not work any more."""
        loaded, card.loaded = card.loaded, None
        if loaded is None:
            return
        del self._loaded[card.number]
        self._unadmitted.discard(card.number)
        stack = Stack(loaded.stack)
        self._stacks[stack] -= 1
        if not self._stacks[stack]:
            del self._stacks[stack]
        if loaded.module is not None:
            del self._card_of_module[loaded.node_id, loaded.module]

    def admitted(self, card: Card) -> None:
        """Notes that a card works from now on."""
        self._unadmitted.discard(card.number)

    def settle(self) -> None:
        """Notes that a card has made a shard: the stack of this run's images is settled."""
        self._vote.settled = True

    def verdicts(self, newcomers: Sequence[Card], starting: int, now: float) -> tuple[list[Decision], list[Verdict]]:
        """Decides which of the loaded cards work, wait or are refused, by comparing their stacks.

        Args:
            newcomers: cards that have loaded since the last time.
            starting: how many cards load, or have loaded and wait.
            now: seconds, monotonic.

        Returns:
            What is to be written down and said, and the cards that are admitted or refused.
        """
        before = self._vote.stack
        self._vote.count(self._stacks, starting > len(self._unadmitted), now)
        stack = self._vote.stack
        decisions: list[Decision] = []
        verdicts: list[Verdict] = []
        if stack is not None:
            if stack != before:
                first = next(card for card in self._loaded.values() if _stack_of(card) == stack)
                assert first.loaded is not None
                decisions.append(UseStack(dict(stack), first.loaded.node))
            vote = stack, self._vote.settled
            judged: Iterable[Card] = newcomers
            if vote != self._judged:
                judged = sorted(self._loaded.values(), key=lambda card: card.number)
            self._judged = vote
            verdicts = [verdict for card in judged if (verdict := self._judge(card, stack)) is not None]
        judged_cards = {verdict.card.number for verdict in verdicts}
        for card in newcomers:
            if card.number not in judged_cards and card.loaded is not None:
                unlike = differences(card.loaded.stack, self._vote.expected or {})
                listed = "; ".join(f"{name} is {here}, and {run_value} in this run" for name, here, run_value in unlike)
                decisions.append(HoldBack(card.number, listed))
        return decisions, verdicts

    def _judge(self, card: Card, stack: Stack) -> Verdict | None:
        assert card.loaded is not None
        starting = card.state is CardState.STARTING
        if _stack_of(card) == stack:
            return Verdict(card) if starting else None
        if self._vote.settled or not starting:
            return Verdict(card, self._requirements.why_unfit(card.loaded, dict(stack)))
        return None


def _stack_of(card: Card) -> Stack:
    assert card.loaded is not None
    return Stack(card.loaded.stack)
