"""What a run costs, and when its budget or its deadline is reached."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from gaudi_batch.config.deadline import parse_deadline
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError
from gaudi_batch.output.cost import Price, money
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.spans import Held, Span, Stopwatch, costs, read_spans, whole_cost
from gaudi_batch.text import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reached:
    """A limit that a run has reached."""

    reason: str
    """Which, and at what."""
    way_out: str
    """What resumes the run."""


class Spending:
    """What a run has cost and may cost, and until when it may go on. Its command begins now.

    Args:
        config: the job.
        driver: prefix of this driver's attempts.
    """

    def __init__(self, config: JobConfig, driver: str) -> None:
        self.price = Price.of(config)
        self.watch = Stopwatch(driver, self.price)
        self.earlier: Sequence[Span] = ()
        """The spans of the drivers before this one."""
        self.reached: Reached | None = None
        """The limit that was reached first; None before."""
        self.budget = config.budget
        self._is_partly_unknown = False
        self._deadline = config.deadline
        self._end = parse_deadline(config.deadline) if config.deadline else None

    def refuse_if_over(self) -> None:
        """Raises InputError if the deadline is a time that is over: a run that is new could only stop at once."""
        if isinstance(self._end, datetime) and self._end <= (now := _now()):
            raise InputError(
                f"deadline: {self._deadline} is over, it is {now.isoformat(timespec='seconds')}; name a later one"
            )

    def read_earlier(self, ledger: OutputReader) -> None:
        """Reads what the drivers before this one have left of their times."""
        self.earlier = read_spans(ledger)
        unknown = costs(self.earlier, self.price).count(None)
        if self.budget is not None and unknown:
            log.warning(
                "what %s of this run cost is not known, as an older version wrote no times of nodes or cards down; the"
                " budget counts without that",
                counted(unknown, "earlier driver"),
            )

    def note_committers(self, drivers: Collection[str]) -> None:
        """Notes who committed something: where one of these left no span, what the run has cost is not known."""
        unknown = len(set(drivers) - {span.driver for span in self.earlier})
        if unknown and not self._is_partly_unknown:
            self._is_partly_unknown = True
            if self.budget is not None:
                log.warning(
                    "%s of this run wrote no times down, as older versions did not; what these cost is not known, and"
                    " the budget counts without that",
                    counted(unknown, "earlier driver"),
                )

    def spent(self, held: Held) -> float:
        """What is known of the cost so far."""
        return sum(cost for cost in costs(self.spans(held), self.price) if cost is not None)

    def spans(self, held: Held) -> list[Span]:
        """The spans of all drivers, this one's so far, with what it holds and has held of the cluster."""
        return [*self.earlier, self.watch.span(held)]

    def cost(self, held: Held) -> float | None:
        """What the run has cost so far; None if that is not known. See `spans`."""
        return None if self._is_partly_unknown else whole_cost(self.spans(held), self.price)

    def expected(self, held: Held, seconds_left: float | None) -> float | None:
        """What the run will have cost if the cards that it holds take so many seconds for the rest; None if that is not
        known.

        Args:
            held: what it holds, and has held, of the cluster.
            seconds_left: at the present rate; None if they are not known.
        """
        cost = self.cost(held)
        rest = None if self.price is None else self.price.cost(held.cards, held.nodes)
        return None if cost is None or rest is None or seconds_left is None else cost + rest * seconds_left

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline; None if there is none."""
        if isinstance(self._end, datetime):
            return (self._end - _now()).total_seconds()
        return None if self._end is None else self._end.total_seconds() - self.watch.seconds

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit that the run may reach yet."""
        return self.reached is None and (self.budget is not None or self._end is not None)

    def examine(self, held: Held) -> Reached | None:
        """The limit that the run has just reached; None if there is none, or it was reported before.

        Args:
            held: what the run holds, and has held, of the cluster.
        """
        if not self.is_limited:
            return None
        self.reached = self._over_budget(held) or self._past_deadline()
        return self.reached

    def _over_budget(self, held: Held) -> Reached | None:
        if self.budget is None:
            return None
        spent = self.spent(held)
        if spent < self.budget:
            return None
        reason = f"the budget of {self.budget:.15g} is reached at {money(spent)}"
        return Reached(reason, "the same command with a larger budget resumes")

    def _past_deadline(self) -> Reached | None:
        if self.seconds_left is None or self.seconds_left > 0:
            return None
        if isinstance(self._end, datetime):
            way_out = "the same command with a later deadline resumes"
            return Reached(f"the deadline, {self._deadline}, is reached", way_out)
        return Reached(f"the deadline of {self._deadline} is reached", "the same command resumes")


def _now() -> datetime:
    return datetime.now(timezone.utc)
