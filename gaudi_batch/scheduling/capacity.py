"""How many cards a run asks the cluster for, and when it stops waiting for one. Pure, a part of the schedule."""

from __future__ import annotations

from gaudi_batch.scheduling.cards import LIVE_STATES, Card, CardState
from gaudi_batch.scheduling.decisions import AskForCards, Decision, DropCards
from gaudi_batch.scheduling.events import Capacity
from gaudi_batch.scheduling.state import RunState

MIN_FAILED_NODES = 2
"""No card is expected to do better once every card of so many nodes has failed."""


class CapacityPlan:
    """The cards that a run has asked for and those that it has.

    Args:
        state: the run.
    """

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._cards = state.cards
        self._next_number = 0
        self._card_seen: float | None = None  # when there last was a card that works or may

    def placed(self, number: int) -> None:
        """Notes that a card has its place."""
        self._cards.unplaced.pop(number, None)
        self._next_number = max(self._next_number, number + 1)

    def adjust(self, capacity: Capacity) -> list[Decision]:
        """Asks for cards that the job should have, and takes back requests for more."""
        wanted = self.wanted(capacity)
        missing = wanted - self._held()
        if missing > 0 and self._state.stop_reason is None:
            numbers = tuple(range(self._next_number, self._next_number + missing))
            self._next_number += missing
            self._cards.unplaced.update(dict.fromkeys(numbers))
            return [AskForCards(numbers)]
        surplus = tuple(self._cards.unplaced)[::-1][: max(0, -missing)]
        for number in surplus:
            del self._cards.unplaced[number]
        return [DropCards(surplus)] if surplus else []

    def wanted(self, capacity: Capacity) -> int:
        """How many places the job should have in the cluster. Quarantined cards keep theirs, or the cluster would give
        these cards out again; other cards of the cluster stand in for them."""
        rules = self._state.rules
        quarantined = self._cards.in_states(CardState.QUARANTINED)
        working_nodes = {card.node for card in self._cards.in_states(*LIVE_STATES)}
        lost = sum(card.node not in working_nodes for card in quarantined)
        usual, requested = capacity.cards, rules.min_cards
        if rules.max_cards is not None:
            # No card is asked for that would have nothing to do.
            usual = min(rules.max_cards, self._state.work.demand())
            requested = max(requested, usual)
        # At most as many again: if all fail, the job is wrong. A node that still works in part is not replaced.
        return max(min(usual + min(usual, len(quarantined)), capacity.total_cards), requested + min(requested, lost))

    def give_up(self, capacity: Capacity, now: float) -> None:
        """Stops the run if no card has worked for too long.

        Args:
            capacity: what the cluster has.
            now: seconds, monotonic.
        """
        others = capacity.total_cards > len(self._cards.in_states(CardState.QUARANTINED))
        if self._card_seen is None or (self._cards.unplaced and others) or self._cards.live_cards():
            self._card_seen = now
        timeout = self._state.rules.cluster_timeout_s
        if now - self._card_seen > timeout:
            error = f"; the last error of one: {self._state.last_error}" if self._state.last_error else ""
            self._state.stop(f"the cluster has had no card that works for {timeout:g} s (limits.cluster){error}")
        # A lost node may be replaced, even if the job asks for none.
        self._state.capacity_expected = bool(self._cards.unplaced or self._cards.in_states(CardState.GONE))

    def is_hopeless(self) -> bool:
        """Whether there is no card and no better one can be expected."""
        return not self._cards.live_cards() and not (self._state.capacity_expected and self._may_get_better())

    def _may_get_better(self) -> bool:
        """Whether another card may do better. It may not if every card failed so far, on several nodes, nor if one node
        after the other was lost."""
        here: list[Card] = self._cards.in_states(*set(CardState) - {CardState.GONE})
        all_failed = all(card.state is CardState.QUARANTINED for card in here)
        failed_nodes = {card.node for card in here}
        return not self._state.node_losses.hopeless and (not all_failed or len(failed_nodes) < MIN_FAILED_NODES)

    def _held(self) -> int:
        """Places that the cluster has given or was asked for, without those of cards that leave."""
        return len(self._cards.unplaced) + len(self._cards.in_states(*LIVE_STATES, CardState.QUARANTINED))
