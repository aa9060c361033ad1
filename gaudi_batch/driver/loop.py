"""The driver's event loop: tells the schedule what happened, and carries out what it decides.

What may have to wait leaves the loop for a thread: commits, since storage may be slow, and what Ray's control service
is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from gaudi_batch.driver.background import Background
from gaudi_batch.driver.committer import Committer, check_storage, probe_attempt
from gaudi_batch.driver.doing import Doing, Watch, waits_for
from gaudi_batch.driver.fleet import Fleet
from gaudi_batch.driver.history import CardsAtWork, note_decision, note_end, note_event
from gaudi_batch.driver.leftovers import Leftovers
from gaudi_batch.driver.metrics import RunMetrics
from gaudi_batch.driver.places import CardsOfRun
from gaudi_batch.driver.progress import RunProgress
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import EVENTS_FILE
from gaudi_batch.output.commits import Commits
from gaudi_batch.output.lease import LeaseLost
from gaudi_batch.output.progress import ProgressRecord
from gaudi_batch.plan import Shard
from gaudi_batch.redaction import redact
from gaudi_batch.reporting.terminal import View
from gaudi_batch.scheduling import decisions as decided
from gaudi_batch.scheduling import events
from gaudi_batch.scheduling.event_log import EventLog
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.stack_vote import differences
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

LIMITS_INTERVAL_S = 0.5
"""Seconds between two looks for cards that have passed a limit."""
TICK_INTERVAL_S = 0.2
"""Seconds between two looks whether a shard is overdue while a card idles."""
PROGRESS_INTERVAL_S = 5.0
"""Seconds between two writings of progress.json, and of what has become of the cards."""
METRICS_INTERVAL_S = 5.0
"""Seconds between two recordings of metrics, of which Ray exports the last each 10 s by default."""
UNUSUAL_INTERVAL_S = 10.0
"""Seconds between two looks for slow things to log."""


class Driver:
    """Runs what a schedule still has to do. To be made in the event loop that it runs in.

    Args:
        cards: what the cards are.
        schedule: the state of the run.
        commits: those of the run, with the output's records.
        leftovers: notes the attempts.
        progress: what the run reports of itself.
        view: shows progress.
    """

    def __init__(
        self,
        cards: CardsOfRun,
        schedule: Schedule,
        commits: Commits,
        leftovers: Leftovers,
        progress: RunProgress,
        view: View,
    ) -> None:
        self.at_once = False
        """Whether the run ends without waiting for anything."""
        self.loop = asyncio.get_running_loop()
        """The loop that the run is in; another thread reaches the driver through it alone."""
        self.events = EventLog(schedule)
        self._cards = cards
        self._schedule = schedule
        self._commits = commits
        self._ledger = commits.ledger
        self._leftovers = leftovers
        self._progress = progress
        self._view = view
        self._metrics = RunMetrics(cards.setup, schedule, progress)
        self._background = Background(self._failed)
        self._committer = Committer(commits, progress)
        self.fleet = Fleet(cards, schedule, progress, self._background, self.tell, self._committer.keep)
        self._at_work = CardsAtWork(progress.timeline, self.fleet.slots)
        self._over: asyncio.Future[str | None] = self.loop.create_future()
        self._watch = Watch()
        self._actions: Mapping[type, Callable[[Any], None]] = {
            decided.AskForCards: self.fleet.ask_for,
            decided.DropCards: self.fleet.drop,
            decided.Admit: self.fleet.admit,
            decided.HoldBack: self.fleet.hold_back,
            decided.Assign: self._assign,
            decided.Recall: self.fleet.recall,
            decided.Drop: self.fleet.end_attempt,
            decided.Replace: self.fleet.replace,
            decided.Quarantine: self.fleet.quarantine,
            decided.Release: self.fleet.release,
            decided.GiveBack: self.fleet.give_back,
            decided.NoteFault: self._note_fault,
            decided.UseStack: self._use_stack,
            decided.Commit: self._begin_commit,
            decided.Discard: self._discard,
            decided.CheckStorage: self._begin_check,
            decided.Finish: self._finish,
        }

    # -- the run ------------------------------------------------------------------------------------------------

    async def run(self) -> str | None:
        """Runs to the end; returns why it stopped, or None if every shard is committed."""
        for work in (
            self.fleet.follow_cluster,
            self.fleet.place,
            self._enforce_limits,
            self._tick,
            self._report,
            self._record_metrics,
        ):
            self._background.spawn(work())
        stopped = True
        try:
            reason = await self._over
            stopped = reason is not None
            return reason
        finally:
            self._at_work.tell_idle(0.0)
            note_end(self._progress.timeline, self.fleet.slots.values(), self.fleet.doings())
            if stopped:
                self._ledger.storage.shut_down()
            self._background.cancel()
            await self._committer.close(wait=not self.at_once)
            self._metrics.record(self.fleet.slots.values())
            await self.fleet.close()
            if not self.at_once:
                await self._write_end(stopped)
            self._background.shut_down()

    def tell(self, event: events.Event) -> None:
        """Tells the schedule what happened and carries out its decisions."""
        note_event(self._progress.timeline, event, self.fleet.slots)
        self._at_work.note_event(event)
        if isinstance(event, events.RecallAnswered) and event.given_back:
            self._leftovers.settled(event.attempt)
        for decision in self.events.handle(event):
            self._actions[type(decision)](decision)
            self._at_work.note_decision(decision)
            note_decision(self._progress.timeline, decision, self.fleet.slots)

    def stop(self, reason: str, grace: float | None) -> None:
        """Takes up no more work and ends when what has begun is committed.

        Args:
            reason: why.
            grace: seconds after which it ends at the latest; None leaves that to the limits of the cards, which end
                each that hangs.
        """
        self.tell(events.StopRequested(reason))
        if grace is not None:
            self.loop.call_later(grace, self.tell, events.StopForced(reason))

    def stop_at_once(self, reason: str) -> None:
        """Ends without waiting for commits under way or for storage that fails. What is committed stays; the next
        driver makes the rest again."""
        self.at_once = True
        self._ledger.storage.shut_down(0.0)
        self.tell(events.StopForced(reason))

    def _failed(self, error: Exception) -> None:
        if isinstance(error, LeaseLost):
            self.stop_at_once(str(error))
        elif isinstance(error, StorageError):
            self.tell(events.RunFailed(redact(str(error))))
        elif isinstance(error, RayError):
            self.tell(events.RunFailed(f"Ray can't be asked any more: {redact(one_line(error, 300))}"))
        elif not self._over.done():
            self._over.set_exception(error)

    def _finish(self, decision: decided.Finish) -> None:
        if not self._over.done():
            self._over.set_result(decision.reason)

    # -- what the schedule decides ------------------------------------------------------------------------------

    def _note_fault(self, decision: decided.NoteFault) -> None:
        self.fleet.fault(decision.card, decision.error, quiet=decision.quiet)

    def _use_stack(self, decision: decided.UseStack) -> None:
        before = self._ledger.use_stack(dict(decision.stack))
        for name, now, then in differences(decision.stack, before):
            log.warning(
                "%s is %s on node %s and was %s before in this run; images may differ", name, now, decision.node, then
            )

    def _assign(self, decision: decided.Assign) -> None:
        task, card = decision.task, self.fleet.slots[decision.card].name
        self._leftovers.begun(task.attempt, task.shard.number, card)
        self.fleet.assign(decision)

    def _begin_commit(self, decision: decided.Commit) -> None:
        async def commit() -> None:
            shard = await self._committer.commit(decision.attempt)
            if self._commits.attempt_of(shard) == decision.attempt:  # else another driver's manifest stays
                self._leftovers.settled(decision.attempt)
            self.tell(events.ShardCommitted(shard))

        self._committer.begun(self._background.guarded(commit()))

    def _discard(self, decision: decided.Discard) -> None:
        self._committer.discard(decision.attempt)

    def _begin_check(self, decision: decided.CheckStorage) -> None:
        self._leftovers.probed(probe_attempt(self._schedule.prefix), decision.shard.number)
        self._background.spawn(self._check_storage(decision.shard))

    async def _check_storage(self, shard: Shard) -> None:
        check = check_storage, self._ledger, self._cards.setup.job.dataset, shard, self._schedule.prefix
        try:
            of_shard = await self._background.in_thread(*check)
        except StorageError as error:
            self.tell(events.StorageChecked(shard.number, redact(str(error))))
        else:
            self.tell(events.StorageChecked(shard.number, None, of_shard))

    # -- clocks -------------------------------------------------------------------------------------------------

    async def _enforce_limits(self) -> None:
        """Kills cards that have passed a limit, stops a run that has reached one, and shows the progress."""
        looked = warned = time.monotonic()
        while True:
            late = time.monotonic() - looked - LIMITS_INTERVAL_S
            looked += LIMITS_INTERVAL_S + late
            self.fleet.enforce_limits(late if late > LIMITS_INTERVAL_S else 0.0)
            self.check_ray()
            if (limit := self._progress.limit_reached(self.fleet.slots.values())) is not None:
                log.warning("%s: finishing what has begun", limit)
                self.stop(limit, None)
            cards = self.fleet.doings()
            if time.monotonic() - warned > UNUSUAL_INTERVAL_S:
                warned = time.monotonic()
                for line in self._watch.due(cards):
                    log.warning("%s", line)
            self._progress.note(self.fleet.slots.values())
            self._view.show(lambda: self._describe("running"))
            await asyncio.sleep(LIMITS_INTERVAL_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_INTERVAL_S)
            if self._schedule.is_waiting_for_time():
                self.tell(events.TimePassed(time.monotonic()))

    def check_ray(self) -> None:
        """Tells the schedule if Ray takes long to answer."""
        since = self._background.asking_ray_since
        if since is not None and time.monotonic() - since > LIMITS_INTERVAL_S:
            self.tell(events.RaySilent(time.monotonic() - since))

    async def _report(self) -> None:
        while True:
            await self._background.in_thread(self._ledger.ensure_held)
            self._at_work.tell_idle()
            await self._background.in_thread(self._progress.timeline.write)
            await self._background.in_thread(self._ledger.put_json, "progress.json", self._describe("running"))
            await asyncio.sleep(PROGRESS_INTERVAL_S)

    async def _record_metrics(self) -> None:
        while True:
            self._metrics.record(self.fleet.slots.values())
            await asyncio.sleep(METRICS_INTERVAL_S)

    async def _write_end(self, stopped: bool) -> None:
        try:
            await self._background.in_thread(self._progress.timeline.write)
            await self._background.in_thread(self._ledger.put_json, "progress.json", self._describe("over"))
            if stopped:
                await self._background.in_thread(self._ledger.put, EVENTS_FILE, self.events.dump())
        except StorageError as error:
            if not stopped:
                raise
            log.warning("progress.json is not up to date: %s", error)

    def _describe(self, state: str) -> ProgressRecord:
        cards = self.fleet.doings() if state == "running" else {}
        waits = self._waits_for(cards) if state == "running" else None
        return self._progress.describe(self.fleet.slots.values(), cards, waits, state)

    def _waits_for(self, cards: Mapping[str, Sequence[Doing]]) -> str | None:
        storage_s = self._ledger.storage.longest_running_s()
        # A run that stops gives its cards back while it commits what they have made.
        working = self.fleet.count_ready() + (self._schedule.stop_reason is not None)
        return waits_for(cards.values(), working, storage_s, self.fleet.rules.need)
