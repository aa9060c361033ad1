"""What a run reports while it goes on: its progress, its rate, and what each card does and has done."""

from __future__ import annotations

import collections
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict

import pyarrow as pa

from gaudi_batch.card.readings import Readings
from gaudi_batch.driver.doing import Doing, describe_doings
from gaudi_batch.driver.run_context import Committed
from gaudi_batch.driver.slot import Slot, held_of_cluster
from gaudi_batch.driver.spending import Spending
from gaudi_batch.driver.time_left import Rate, TimeLeft
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.progress import DOING_FIELDS, CardProgress, FaultRecord, ProgressRecord
from gaudi_batch.output.spans import Held
from gaudi_batch.output.throughput import ThroughputTotals, rounded
from gaudi_batch.output.timeline import Timeline
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.schedule import Schedule

FAULTS_KEPT = 100


class RunProgress:
    """The commits, the faults and the rate of a run.

    Args:
        schedule: the state of the run.
        committed: what is committed so far; goes on being added to.
        images_total: images that the whole plan asks for.
        images_missing: images that committed shards were to have and have not, since rows failed.
        spending: the times of the run's drivers, and what it costs and may cost.
        timeline: is told of faults.
    """

    def __init__(
        self,
        schedule: Schedule,
        committed: Committed,
        images_total: int,
        images_missing: int,
        spending: Spending,
        timeline: Timeline,
    ) -> None:
        self.timeline = timeline
        self.faults: Counter[str] = Counter()
        self.held = Held()
        """What this driver held of the cluster at the last report."""
        self._schedule = schedule
        self._totals = committed.totals
        self._failed = committed.failed
        self.images_total = images_total
        """Images that the whole plan asks for."""
        self._missing = images_missing
        missing = schedule.shards.values()
        self._left = sum(shard.images for shard in missing)  # of shards that are not committed
        self._replaced = sum(shard.images_before for shard in missing)
        self._rows_again = sum(shard.rows for shard in missing if shard.is_rerun)
        self._made = 0
        self._seen: dict[int, int] = {}  # images that the process of each slot had made
        self._spending = spending
        self._recent_faults: collections.deque[FaultRecord] = collections.deque(maxlen=FAULTS_KEPT)
        self._rate = Rate()

    def introduce(self, slot: Slot) -> None:
        """A card is up; it is in the reports from now on."""
        assert slot.ready is not None
        self._totals.card(slot.name, slot.ready.node, slot.ready.module)

    def fault(self, slot: Slot, what: str) -> None:
        """A card failed."""
        self.faults[slot.label] += 1
        self._recent_faults.append({"time": _now(), "card": slot.label, "what": what})
        self.timeline.note(slot.number, slot.name, "fault", error=what)

    def committed(self, info: CommitInfo, failed: pa.Table | None) -> None:
        """A shard is committed; `failed` are its failed rows, if there are any."""
        self._totals.add(info)
        if failed is not None:
            self._failed.add(info.shard, failed)
        shard = self._schedule.shards[info.shard]
        self._missing += (0 if shard.is_rerun else shard.images) - info.images + info.images_before
        self._left -= shard.images
        self._replaced -= shard.images_before
        self._rows_again -= shard.rows if shard.is_rerun else 0

    def limit_reached(self, slots: Collection[Slot]) -> str | None:
        """The budget or the deadline, if the run has just reached it: why it is to stop."""
        if not self._spending.is_limited:
            return None
        reached = self._spending.examine(held_of_cluster(slots, time.monotonic()))
        return None if reached is None else reached.reason

    def note(self, slots: Collection[Slot]) -> None:
        """Notes what the cards have made, for the rate; to be called every few seconds or more often."""
        for slot in slots:
            if slot.status is not None:
                now, before = slot.status.work.images, self._seen.get(slot.number, 0)
                self._made += now - before if now >= before else now  # fewer: another process has begun
                self._seen[slot.number] = now
        states = [self._schedule.state(slot.number) for slot in slots]
        self._rate.note(time.monotonic(), self._made, states.count(CardState.READY))

    def images(self, slots: Collection[Slot]) -> int:
        """Images that are committed and are not to be made again, and those that are stored of shards that cards still
        make."""
        return self._totals.images - self._replaced + self._in_the_making(slots)

    def images_left(self, slots: Collection[Slot]) -> int:
        """Images that are still to be made, those of rows that are run again included."""
        return max(0, self._left - self._in_the_making(slots))

    def _in_the_making(self, slots: Collection[Slot]) -> int:
        """Images that are stored of shards that are not committed; of one that a backup attempt makes, too, those of
        the attempt that has more."""
        of_shards = {shard: self._schedule.shards[shard].images for shard in self._schedule.committing}
        for slot in slots:
            for attempt, images in slot.status.images_of.items() if slot.status and slot.actor else ():
                shard = self._schedule.shard_of(attempt)
                if shard is not None:
                    of_shards[shard] = max(images, of_shards.get(shard, 0))
        return sum(of_shards.values())

    def left(self, slots: Collection[Slot]) -> TimeLeft:
        """How long the rest takes."""
        return self._rate.left(self.images_left(slots))

    def describe(
        self, slots: Collection[Slot], cards: Mapping[str, Sequence[Doing]], waits_for: str | None, state: str
    ) -> ProgressRecord:
        """The content of progress.json, which the terminal shows, too.

        Args:
            slots: its cards.
            cards: what each of them is at, by its label.
            waits_for: what the run as a whole waits for, if it does.
            state: `running` or `over`.
        """
        self.note(slots)
        images, rate, left = self.images(slots), self._rate.images_per_s(), self.left(slots)
        if self._schedule.stop_reason is not None:
            left = TimeLeft(None)  # it makes no more than what has begun
        now = time.monotonic()
        self.held = held_of_cluster(slots, now)
        return {
            "time": _now(),
            "state": state,
            "images": images,
            "images_total": self.images_total,
            "images_missing": self._missing,
            "images_left": self.images_left(slots),
            "images_again": self._replaced,
            "rows_again": self._rows_again,
            "failed_rows": self._schedule.failed_rows,
            "failures": self._failed.describe(),
            "images_per_s": None if rate is None else round(rate, 3),
            "seconds_left": _rounded(left.seconds),
            "seconds_left_low": _rounded(left.low),
            "seconds_left_high": _rounded(left.high),
            "shards_pending": self._schedule.pending(),
            "retries": self._schedule.retries,
            "drivers": [asdict(span) for span in self._spending.spans(self.held)],
            "cost": rounded(self._spending.cost(self.held)) if self._spending.price else None,
            "cost_expected": rounded(self._spending.expected(self.held, left.seconds)),
            "waits_for": waits_for,
            "cards": {slot.label: self._describe_card(slot, cards.get(slot.label, ())) for slot in slots},
            "faults": list(self._recent_faults),
        }

    def _describe_card(self, slot: Slot, at: Sequence[Doing]) -> CardProgress:
        of_card = self._totals.cards.get(slot.name)
        first = at[0].describe() if at else dict.fromkeys(DOING_FIELDS)
        sums = (of_card.sums if of_card else ThroughputTotals()).describe()
        readings = slot.status.readings if slot.status and slot.actor else Readings()
        return {
            "node": slot.ready.node if slot.ready else None,
            "module": slot.ready.module if slot.ready else None,
            "pid": slot.ready.pid if slot.ready and slot.actor else None,
            "state": self._schedule.state(slot.number).value,
            "phase": first["phase"],
            "phase_s": first["phase_s"],
            "limit_s": first["limit_s"],
            "shard": first["shard"],
            "bucket": first["bucket"],
            "rows": first["rows"],
            "doing": describe_doings(at) or None,
            "images": (of_card.sums.images if of_card else 0) + (slot.status.images if slot.status else 0),
            "images_per_s": sums["images_per_s"],
            "faults": self.faults[slot.label],
            "watts": readings.watts,
            "temperature_c": readings.temperature_c,
            "utilisation": readings.utilisation,
            "memory_used_mb": readings.memory_used_mb,
            "throttled": readings.throttled,
            "energy_j": sums["energy_j"],
        }


def _rounded(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
