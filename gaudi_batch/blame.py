"""What is known of a shard that has failed, and which of its rows is to blame. Pure, a part of the schedule.

* A row that raised alone, on a card that made no other row afterwards, is accused. Raising alone on the next card
  makes it a failed row.
* Death narrows. A shard in hand when its process died announces each batch before the call. The batch announced at
  the second death runs row by row. The row announced at the third is condemned once two cards have died of its shard
  (or the only card there is, three times): it is recorded as failed without another try.
* A shard that failed `MAX_TRIES` times and taught nothing new is stuck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_TRIES = 8
DEATHS_TO_CONDEMN = 3


@dataclass
class Trouble:
    """The history of one shard's failures."""

    failed_on: list[int] = field(default_factory=list)
    """A card for each failure of any kind."""
    died_on: list[int] = field(default_factory=list)
    """A card for each death."""
    announce: bool = False
    """Whether its batches are to be announced."""
    alone: frozenset[int] = frozenset()
    """Rows to run one at a time."""
    accused: dict[int, str] = field(default_factory=dict)
    """Rows that raised alone on one card, with the error."""
    condemned: dict[int, str] = field(default_factory=dict)
    """Rows that killed, with the error."""
    error: str = ""
    """The last one."""
    _tries: int = 0  # failures since something was learnt

    @property
    def stuck(self) -> bool:
        """Whether trying again has stopped to teach anything."""
        return self._tries >= MAX_TRIES

    def raised(self, card: int, error: str, accused: Mapping[int, str]) -> None:
        """An attempt failed on a card whose process lives."""
        self._failed(card, error)
        for row, said in accused.items():
            if row not in self.accused:
                self.accused[row] = said
                self._tries = 0

    def died(self, card: int, error: str, announced: frozenset[int] | None, others: bool) -> None:
        """A card's process died while it held the shard.

        Args:
            card: the card.
            error: how it died.
            announced: rows of the last batch that it announced, if it announced any.
            others: whether there is a card that has not died of this shard.
        """
        self._failed(card, error)
        self.died_on.append(card)
        self.announce = True
        if not announced:
            return
        if not announced <= self.alone:
            self.alone |= announced
            self._tries = 0
        elif len(announced) == 1 and len(self.died_on) >= DEATHS_TO_CONDEMN:
            (row,) = announced
            if len(set(self.died_on)) > 1 or not others:
                self.condemned[row] = f"the card's process died of this row: {error}"
                self._tries = 0

    def _failed(self, card: int, error: str) -> None:
        self.failed_on.append(card)
        self.error = error
        self._tries += 1
