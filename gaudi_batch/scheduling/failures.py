"""What is known of a shard that has failed, and which of its rows is at fault. Pure, a part of the schedule.

* A row that raised alone, on a card that made no other row afterwards, has failed alone once. Raising alone on the next
  card makes it a failed row.
* A row whose image came out wrong twice on one card, or could not be encoded, is doubted: the shard's record is held
  until another card has made the row alone. If it fails there, too, the record is committed as it is; if not, the
  first card was wrong, and the shard is made again.
* A row group that one card could not decode fails, with its rows, when another can't either.
* Death narrows. A shard that was in flight when its process died is suspect: it runs on a card that holds nothing else,
  and each reading and each batch is announced before it begins. The batch announced at the second death runs row by
  row. The row announced at the third is recorded as failed without another try, once two cards have died of its shard
  (or the only card there is, three times). In the same way the row group announced at the second
  death is decoded row by row, and what can't be read past the third is unreadable, for all shards of that group
  (`rowgroups.py`).
* The unannounced loss of a node counts for each shard in flight there. After `MAX_SHARED_NODE_LOSSES` the shard is
  suspect and runs where no other shard of the run is in flight on its node; what that node dies of is then as a death.
* A shard that failed `MAX_TRIES` times and showed nothing new is stuck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gaudi_batch.plan import Shard
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.scheduling.events import Reading, ShardFailure, ShardOutcome
from gaudi_batch.scheduling.rowgroups import RowGroups

MAX_TRIES = 8
DEATHS_TO_FAIL_A_ROW = 3
DEATHS_READING_A_ROW = 2
MAX_SHARED_NODE_LOSSES = 2
"""A shard that was lost with so many nodes runs alone on a node."""


@dataclass
class Incident:
    """A failure of a card, with all that was in flight on it. It was the card's fault if other cards make all of
    that."""

    card: int
    shards: set[int]

    def made(self, shard: int, cleared: bool) -> bool:
        """Notes that a shard was made; returns whether that was the last and the card is at fault.

        Args:
            shard: the shard.
            cleared: whether rows of it failed, which explains the card's failure.
        """
        if cleared:
            self.shards.clear()
        elif shard in self.shards:
            self.shards.discard(shard)
            return not self.shards
        return False


@dataclass(frozen=True)
class Held:
    """A record that waits until another card has made its failed rows again."""

    attempt: str
    card: int
    outcome: ShardOutcome


@dataclass
class ShardFailures:
    """The history of one shard's failures."""

    failed_on: list[int] = field(default_factory=list)
    """The card of each failure of any kind."""
    died_on: list[int] = field(default_factory=list)
    """The card of each death."""
    announce: bool = False
    """Whether the shard is suspect: the card announces each reading and each batch."""
    alone_on_node: bool = False
    """Whether no other shard of the run may be in flight on its node."""
    alone: frozenset[int] = frozenset()
    """Rows to run one at a time."""
    failed_alone_once: dict[int, str] = field(default_factory=dict)
    """Rows that failed alone on one card, with their errors."""
    fail_without_running: dict[int, str] = field(default_factory=dict)
    """Rows that killed a process, with the error."""
    undecoded: dict[int, str] = field(default_factory=dict)
    """Row groups that one card could not decode, with their errors."""
    held: Held | None = None
    """The record that waits for a second card."""
    incidents: list[Incident] = field(default_factory=list)
    error: str = ""
    """The last error."""
    read_deaths: int = 0
    """Deaths while its rows were read a few at a time."""
    hopeless: bool = False
    """Whether no card can make the shard, since the driver can't read its rows either."""
    _node_losses: int = 0
    _tries: int = 0  # failures since one showed something new

    @property
    def stuck(self) -> bool:
        """Whether another try would show nothing new."""
        return self.hopeless or self._tries >= MAX_TRIES

    def task(self, shard: Shard, attempt: str, row_groups: RowGroups) -> ShardTask:
        """The next attempt, with all that is known of the rows."""
        return ShardTask(
            shard,
            attempt,
            announce=self.announce or row_groups.doubt(shard),
            alone=self.alone,
            failed_alone_once=dict(self.failed_alone_once),
            fail_without_running=dict(self.fail_without_running),
            by_row=row_groups.by_row(shard),
            unreadable=row_groups.unreadable(shard),
            undecoded=dict(self.undecoded),
            confirm=frozenset(self.held.outcome.doubted) if self.held else frozenset(),
        )

    def raised(self, card: int, failure: ShardFailure) -> None:
        """Notes a failure of an attempt on a card whose process lives."""
        # Storage that fails for one card says nothing of the shard as long as another card can try.
        self._failed(card, failure.error, not failure.storage or card in self.failed_on)
        for known, reported in (
            (self.failed_alone_once, failure.failed_alone_once),
            (self.undecoded, failure.undecoded),
        ):
            for key, error in reported.items():
                if key not in known:
                    known[key] = error
                    self._tries = 0

    def died(self, card: int, error: str, at: Reading | frozenset[int] | None, others: bool) -> None:
        """Notes that a card's process died while it worked on the shard.

        Args:
            card: the card.
            error: how it died.
            at: what it had announced last: a reading, the rows of a batch, or nothing.
            others: whether there is a card that has not died of this shard.
        """
        self._failed(card, error)
        if at or not self.announce:  # a suspect shard announces all that it does
            self.died_on.append(card)
        self.announce = True
        if isinstance(at, Reading):
            self.read_deaths += at.by_row
            return  # what this says holds for all shards of the row group
        if at and not at <= self.alone:
            self.alone |= at
            self._tries = 0
        elif at and len(at) == 1 and self.is_certain(others):
            self.fail_without_running.update(dict.fromkeys(at, f"the card's process died of this row: {error}"))
            self._tries = 0

    def is_certain(self, others: bool) -> bool:
        """Whether enough processes have died of the shard to blame the row that they were at."""
        return len(self.died_on) >= DEATHS_TO_FAIL_A_ROW and (len(set(self.died_on)) > 1 or not others)

    def is_certain_of_reading(self, others: bool) -> bool:
        """The same for a row that they were reading. The group has killed before."""
        return self.read_deaths >= DEATHS_READING_A_ROW and (len(set(self.died_on)) > 1 or not others)

    def explain(self) -> None:
        """Notes that the failures so far were not the cards' fault."""
        for incident in self.incidents:
            incident.shards.clear()

    def count_tries_anew(self) -> None:
        """Notes a failure that has shown something new: the tries are counted from here."""
        self._tries = 0

    def lost_with_node(self, card: int, at: Reading | frozenset[int] | None, others: bool) -> None:
        """Notes that the card's node went without notice while the shard was in flight there; see `died`."""
        if self.alone_on_node:
            if at:
                self.died(card, "its node was lost", at, others)
            return
        self._node_losses += 1
        self.error = "its node was lost"
        if self._node_losses >= MAX_SHARED_NODE_LOSSES:
            self.announce = self.alone_on_node = True
            self.died_on.append(card)  # these losses together count as the first death

    def await_confirmation(self, held: Held) -> None:
        """Keeps a record until another card has made its doubted rows."""
        self.held = held
        self.failed_on.append(held.card)

    def refute(self, failures: Mapping[int, str]) -> None:
        """Notes that another card made rows of the held record that the first could not; `failures` are those that it
        could not make either."""
        assert self.held is not None
        self.failed_alone_once |= failures
        self.error = f"rows that failed on one card work on another: {sorted(self.held.outcome.doubted)[:5]}"
        self.held = None
        self._tries += 1

    def _failed(self, card: int, error: str, counts: bool = True) -> None:
        self.failed_on.append(card)
        self.error = error
        self._tries += counts
