"""Binds the schedule to Ray: starts cards, turns what happens into events, and carries out what the schedule decides.

One event loop does it all. Each card process has a task that asks it for news; the schedule is told, and what it
decides is carried out at once. What may have to wait leaves the loop for a thread: commits, since storage may be slow,
and what Ray's control service is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from gaudi_batch.card.messages import (
    Announced,
    Begins,
    Begun,
    Broken,
    CardSetup,
    Confirmed,
    Done,
    Event,
    Failed,
    News,
    Ready,
)
from gaudi_batch.cluster.connection import Capacity, CardResources
from gaudi_batch.driver.account import Account
from gaudi_batch.driver.admission import why_unfit
from gaudi_batch.driver.doing import Doing, Watch, doings, waits_for
from gaudi_batch.driver.places import Places
from gaudi_batch.driver.slot import Slot, node_is_gone, why_died
from gaudi_batch.driver.watchdog import BatchTimes, passed_limit
from gaudi_batch.errors import StorageError
from gaudi_batch.layout import attempt_name
from gaudi_batch.output.lease import LeaseLost
from gaudi_batch.output.ledger import Ledger
from gaudi_batch.output.manifest import read as read_manifest
from gaudi_batch.pipelines.stack import differences
from gaudi_batch.plan import Shard
from gaudi_batch.reporting.terminal import View
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.decisions import (
    Assign,
    CheckStorage,
    Commit,
    Decision,
    Discard,
    Finish,
    Quarantine,
    Recall,
    Release,
    Replace,
    ShardTask,
)
from gaudi_batch.scheduling.schedule import Schedule
from gaudi_batch.scheduling.stack_vote import StackVote
from gaudi_batch.text import one_line

log = logging.getLogger("gaudi_batch")

T = TypeVar("T")

NEWS_SECONDS = 1.0
"""How long a card waits for something to happen before it answers; grows with the number of cards."""
CARDS_PER_NEWS_SECOND = 100
LOOK_SECONDS = 0.5
PROGRESS_SECONDS = 5.0
SAY_SECONDS = 10.0
"""How often the cards are looked at for what takes longer than is usual."""
CLUSTER_SECONDS = 2.0
PLACE_SECONDS = 0.2
PLACE_SHARE = 0.1
"""How much longer the last new slot may wait before it is known that it has its place, as a share of its waiting."""
WAITING_SECONDS = 30.0
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for Ray to take the places of its cards back."""
DEPARTURE_SECONDS = 3.0
"""How much later than a card the cluster may notice the end of its node."""
PROBE_BYTES = 1 << 20
"""About as large as an image, so that a disk which has no room for one has none for this."""
COMMIT_THREADS = 8
OTHER_THREADS = 4
COMMIT_SECONDS = 5.0
"""How long the end of a run waits for commits that have been begun."""


class Driver:
    """Runs what a schedule still has to do.

    Args:
        setup: the job, as the cards get it.
        resources: what one card takes of the cluster.
        schedule: the state of the run.
        ledger: the records.
        account: what the run tells of itself.
        view: shows progress.
        look_at_cluster: tells what the cluster has for the job now.
    """

    def __init__(
        self,
        setup: CardSetup,
        resources: CardResources,
        schedule: Schedule,
        ledger: Ledger,
        account: Account,
        view: View,
        look_at_cluster: Callable[[], Capacity],
    ) -> None:
        self.schedule = schedule
        self.at_once = False
        self._setup = setup
        self._resources = resources
        self._ledger = ledger
        self._account = account
        self._view = view
        self._look_at_cluster = look_at_cluster
        self._slots: dict[int, Slot] = {}
        self._numbers = itertools.count()
        self._records: dict[str, Done] = {}
        self._commits: set[asyncio.Task[None]] = set()
        self._commit_pool = ThreadPoolExecutor(COMMIT_THREADS, "commit")
        # Not the event loop's own, whose end would wait for what never comes back.
        self._threads = ThreadPoolExecutor(OTHER_THREADS, "driver")
        self._ray = ThreadPoolExecutor(1, "ray")
        self._asking: float | None = None  # since when Ray is being asked for something
        self._places = Places(setup, resources, schedule.prefix)
        self._batch_times = BatchTimes()
        self._tasks: set[asyncio.Task[None]] = set()
        self.loop: asyncio.AbstractEventLoop
        """That the run runs in; another thread reaches the driver through it alone."""
        self._over: asyncio.Future[str | None]
        self._notes: set[str] = set()
        self._vote = StackVote(ledger.stack)
        self._watch = Watch()

    # -- the run ------------------------------------------------------------------------------------------------

    async def run(self) -> str | None:
        """Runs to the end; returns why it stopped, or None if every shard is committed."""
        self.loop = asyncio.get_running_loop()
        self._over = self.loop.create_future()
        for work in (self._follow_cluster, self._place, self._look, self._report):
            self._spawn(work())
        stopped = True
        try:
            reason = await self._over
            stopped = reason is not None
            return reason
        finally:
            if stopped:
                self._ledger.storage.hurry()
            for task in self._tasks:
                task.cancel()
            # A commit that has been begun can't be taken back: its thread goes on whatever becomes of its task.
            if self._commits and not self.at_once:
                await asyncio.wait(self._commits, timeout=COMMIT_SECONDS)
            self._commit_pool.shutdown(wait=False)
            for slot in self._slots.values():
                slot.actor = None
            closed = asyncio.wrap_future(self._ray.submit(self._places.close))
            self._ray.shutdown(wait=False)
            await asyncio.wait([closed], timeout=CLOSE_SECONDS)
            if not self.at_once:
                try:
                    await self._in_thread(self._ledger.put_json, "progress.json", self._describe("over"))
                except StorageError as error:
                    if not stopped:
                        raise
                    log.warning("progress.json is not up to date: %s", error)
            self._threads.shutdown(wait=False)

    def stop(self, reason: str, grace: float) -> None:
        """Takes up no more work and ends when what has begun is committed, after `grace` seconds at the latest."""
        self._carry_out(self.schedule.stop(reason))
        self.loop.call_later(grace, self.abandon, reason)

    def abandon(self, reason: str, *, at_once: bool = False) -> None:
        """Takes nothing more in. What is committed stays, all else is made again by the next driver.

        Args:
            reason: why.
            at_once: do not even wait for commits under way, nor for storage that fails.
        """
        self.at_once = self.at_once or at_once
        if at_once:
            self._ledger.storage.patience = 0.0
        if not self._over.done():
            self._over.set_result(reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # a task that is cancelled at once never begins it
        return task

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self.loop.run_in_executor(self._threads, function, *arguments)

    def _ask_ray(self, function: Callable[..., T], *arguments: Any) -> asyncio.Future[T]:
        """Has Ray asked for something, after all that it was to be asked before."""

        def asked() -> T:
            self._asking = time.monotonic()
            try:
                return function(*arguments)
            finally:
                self._asking = None

        return self.loop.run_in_executor(self._ray, asked)

    def _tell_ray(self, function: Callable[..., None], slot: Slot) -> None:
        async def told() -> None:
            await asked

        asked = self._ask_ray(function, slot.number)
        self._spawn(told())

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except StorageError as error:
            self.abandon(str(error))
        except LeaseLost as error:
            self.abandon(str(error), at_once=True)
        except RayError as error:
            self.abandon(f"Ray can't be asked any more: {one_line(error, 300)}")
        except Exception as error:
            # A task that is gone could leave the run waiting for ever.
            if not self._over.done():
                self._over.set_exception(error)

    # -- cards --------------------------------------------------------------------------------------------------

    async def _follow_cluster(self) -> None:
        """Gives every card that the job should have a slot, now and later, and takes leave of those that go."""
        seen = time.monotonic()
        while True:
            capacity = await self._in_thread(self._look_at_cluster)
            for slot in self._slots.values():
                gone = slot.node_id in capacity.leaving or slot.node_id not in capacity.nodes
                if self._state(slot) is CardState.QUARANTINED and gone:
                    # Its place would move on to a card of another node.
                    self._left(slot)
                elif slot.node_id in capacity.leaving:
                    self._carry_out(self.schedule.leaving(slot.number))
            wanted = self._wanted(capacity)
            missing = wanted - len(self._placed_or_waiting())
            if missing > 0 and self.schedule.stop_reason is None:
                await self._add_slots(missing)
            too_many = len(self._placed_or_waiting()) - wanted
            for slot in self._slots_in(CardState.WAITING)[::-1][: max(0, too_many)]:
                self._tell_ray(self._places.remove, slot)
                del self._slots[slot.number]
            waiting = self._slots_in(CardState.WAITING)
            others = waiting and capacity.there > len(self._slots_in(CardState.QUARANTINED))
            if others or self.schedule.usable():
                seen = time.monotonic()
            patience = self._setup.config.limits.cluster
            if time.monotonic() - seen > patience:
                reason = f"the cluster has had no card that works for {patience:g} s (limits.cluster)"
                error = f"; the last error of one: {self.schedule.last_error}" if self.schedule.last_error else ""
                self._carry_out(self.schedule.stop(reason + error))
            # Where a node has been lost another may come, also for a job that asks for none.
            self._carry_out(self.schedule.expect(bool(waiting or self._slots_in(CardState.GONE))))
            await asyncio.sleep(CLUSTER_SECONDS)

    def _wanted(self, capacity: Capacity) -> int:
        """How many places the job should have in the cluster. Quarantined cards keep theirs, or the cluster would give
        them to this job or to another again, and what is there takes their part."""
        config = self._setup.config
        quarantined = self._slots_in(CardState.QUARANTINED)
        working = {slot.node_id for slot in self._slots_in(CardState.STARTING, CardState.READY)}
        lost = sum(slot.node_id not in working for slot in quarantined)
        most, asked = capacity.cards, config.min_cards
        if config.max_cards is not None:
            # No card is asked for that would have nothing to do.
            most = min(config.max_cards, self.schedule.useful())
            asked = max(asked, most)
        # Once more as many at most: where all fail, the job is wrong. No node is asked for in place of one that still
        # works in part.
        return max(min(most + min(most, len(quarantined)), capacity.there), asked + min(asked, lost))

    async def _add_slots(self, count: int) -> None:
        numbers = list(itertools.islice(self._numbers, count))
        await self._ask_ray(self._places.create, numbers)
        self._slots.update({number: Slot(number) for number in numbers})

    async def _place(self) -> None:
        """Starts the first process of each slot that the cluster has placed, and says how long others wait."""
        next_word = WAITING_SECONDS
        while True:
            waiting = self._slots_in(CardState.WAITING)
            if waiting:
                placed = await self._ask_ray(self._places.placed, [slot.number for slot in waiting])
                for slot in self._slots_in(CardState.WAITING):
                    if slot.number in placed:
                        slot.node_id, slot.placed = placed[slot.number], time.monotonic()
                        self._carry_out(self.schedule.starting(slot.number, slot.node_id))
                        self._start(slot)
                waiting = self._slots_in(CardState.WAITING)
            waits = [time.monotonic() - slot.since for slot in waiting]
            if not waits:
                next_word = WAITING_SECONDS
            elif max(waits) > next_word:
                next_word *= 2
                who = f"{waiting[0].where} has" if len(waits) == 1 else f"{len(waits)} cards have"
                log.info("%s waited %.0f s for the cluster: no %s is free", who, max(waits), self._need)
            await asyncio.sleep(min(max(PLACE_SECONDS, PLACE_SHARE * min(waits, default=0.0)), CLUSTER_SECONDS))

    @property
    def _need(self) -> str:
        return f"{self._resources.amount} {self._resources.name}"

    def _slots_in(self, *states: CardState) -> list[Slot]:
        return [slot for slot in self._slots.values() if self._state(slot) in states]

    def _placed_or_waiting(self) -> list[Slot]:
        return self._slots_in(*set(CardState) - {CardState.GONE, CardState.LEAVING})

    def _left(self, slot: Slot) -> None:
        """A slot's node is gone."""
        log.warning("%s left with its node", slot.where)
        self._give_back(slot)
        self._carry_out(self.schedule.gone(slot.number))

    def _give_back(self, slot: Slot) -> None:
        slot.given_back = time.monotonic()
        self._tell_ray(self._places.remove, slot)

    def _start(self, slot: Slot) -> None:
        slot.status = None
        slot.passed = None
        slot.up = False
        slot.heard = time.monotonic()
        slot.starting = self._spawn(self._begin(slot))

    async def _begin(self, slot: Slot) -> None:
        try:
            slot.actor = await self._ask_ray(self._places.start, slot.number)
        except RayError as error:
            slot.starting = None
            await self._lost(slot, error)
            return
        slot.starting, slot.heard = None, time.monotonic()
        await self._listen(slot, slot.actor)

    async def _listen(self, slot: Slot, actor: Any) -> None:
        """Asks one card process for news until it dies or is replaced."""
        acknowledged = 0
        while slot.actor is actor:
            try:
                news: News = await actor.news.remote(acknowledged, self._news_s, time.time())
            except ActorUnavailableError:
                await asyncio.sleep(NEWS_SECONDS)
                continue
            except (RayActorError, RayError) as error:
                if slot.actor is actor:
                    await self._lost(slot, error)
                return
            if slot.actor is not actor:
                return
            slot.status, slot.heard = news.status, time.monotonic()
            self._batch_times.learn(news.status)
            for number, event in news.events:
                acknowledged = number
                if slot.actor is actor:  # an event may have it replaced
                    self._take(slot, event)

    @property
    def _news_s(self) -> float:
        """How long a card that has nothing to say waits before it answers."""
        return max(NEWS_SECONDS, len(self._slots) / CARDS_PER_NEWS_SECOND)

    def _take(self, slot: Slot, event: Event) -> None:
        schedule = self.schedule
        if isinstance(event, Ready):
            self._introduce(slot, event)
        elif isinstance(event, Broken):
            self._fault(slot, event.error)
            self._carry_out(schedule.broken(slot.number, event.error, event.storage))
        elif isinstance(event, Begun):
            self._carry_out(schedule.begun(event.attempt, event.generating))
        elif isinstance(event, Begins):
            self._carry_out(schedule.reading(event.attempt, event.reading))
        elif isinstance(event, Announced):
            self._carry_out(schedule.announced(event.attempt, event.rows))
        elif isinstance(event, Failed):
            self._fault(slot, f"failed at {event.attempt}: {event.failure.error}")
            self._carry_out(schedule.failed(event.attempt, event.failure))
        elif isinstance(event, Confirmed):
            self._carry_out(schedule.confirmed(event.attempt, event.failures))
        elif schedule.is_live(event.attempt):
            self._vote.settled = True
            self._records[event.attempt] = event
            if event.outcome.transient_failures:
                self._fault(
                    slot, f"made wrong what was right when made again, {event.outcome.transient_failures} times"
                )
            self._carry_out(schedule.done(event.attempt, event.outcome))

    def _introduce(self, slot: Slot, ready: Ready) -> None:
        for other in self._slots.values():
            held = other.ready
            if other is slot or held is None or ready.module is None:
                continue
            if (
                other.up
                and self._state(other) in (CardState.STARTING, CardState.READY)
                and (held.node_id, held.module)
                == (
                    ready.node_id,
                    ready.module,
                )
            ):
                error = f"Ray gave it module {ready.module} of node {ready.node}, which card {other.name} holds"
                self._fault(slot, error)
                self._carry_out(self.schedule.died(slot.number, error))
                return
        before = slot.ready
        if before is None or (before.node_id, before.module) != (ready.node_id, ready.module):
            # Ray may have moved its place to another node meanwhile.
            slot.name = self._card_name(slot, ready)
        slot.ready, slot.node_id = ready, ready.node_id
        unfit = why_unfit(ready, self._setup, ready.stack)
        if unfit:
            self._refuse(slot, unfit)
            return
        slot.up = True
        self._settle_stack()
        if self._state(slot) is CardState.STARTING:
            found = differences(ready.stack, self._vote.expected or {})
            said = "; ".join(f"{name} is {here}, and {there} in this run" for name, here, there in found)
            log.warning("%s waits for what the other cards have: %s", slot.where, said)

    def _settle_stack(self) -> None:
        """Has cards that have loaded work, wait or be refused, by what shapes their images."""
        placed = self._slots_in(CardState.STARTING, CardState.READY)
        up = [(slot, slot.ready) for slot in placed if slot.up and slot.ready is not None]
        before = self._vote.stack
        self._vote.count([ready.stack for _, ready in up], len(up) < len(placed), time.monotonic())
        stack = self._vote.stack
        if stack is None:
            return
        if stack != before:
            node = next(ready.node for _, ready in up if ready.stack == stack)
            for name, now, then in differences(stack, self._ledger.use_stack(stack)):
                log.warning(
                    "%s is %s on node %s and was %s before in this run; images may differ", name, now, node, then
                )
        for slot, ready in up:
            waits = self._state(slot) is CardState.STARTING
            if ready.stack != stack and (self._vote.settled or not waits):
                self._refuse(slot, why_unfit(ready, self._setup, stack))
            elif ready.stack == stack and waits:
                self._admit(slot, ready)

    def _refuse(self, slot: Slot, why: str) -> None:
        self._account.fault(slot, why)
        self._carry_out(self.schedule.refused(slot.number, why))

    def _admit(self, slot: Slot, ready: Ready) -> None:
        self._account.introduce(slot)
        self._batch_times.loaded(ready.load_s)
        threads = "" if ready.threads is None else f", with {ready.threads} threads"
        log.info("%s is ready after %.1f s%s", slot.where, ready.load_s, threads)
        for note in ready.notes:
            if note not in self._notes:
                self._notes.add(note)
                log.warning("%s: %s", slot.where, note)
        self._carry_out(self.schedule.ready(slot.number, ready.node_id))

    def _card_name(self, slot: Slot, ready: Ready) -> str:
        """A card is called after its place, so that its records mean the same card in the next run, too."""
        name = f"{ready.node}-{slot.number if ready.module is None else ready.module}"
        if any(other.name == name for other in self._slots.values() if other is not slot):
            # Two Ray nodes of one host, or a node that came back under its name.
            name = f"{name}-{ready.node_id[-6:]}"
        return name

    async def _lost(self, slot: Slot, error: Exception) -> None:
        slot.up = False
        reason = slot.passed.reason if slot.passed else why_died(error)
        slow = slot.passed.slow if slot.passed else None
        gone = not slot.passed and await self._node_went(slot, error)
        slot.actor = None
        if gone or self._state(slot) is CardState.LEAVING:
            self._left(slot)
            return
        self._fault(slot, f"died: {reason}")
        self._carry_out(self.schedule.died(slot.number, reason, slow))

    async def _node_went(self, slot: Slot, error: Exception) -> bool:
        """Whether a card died with its node, whose end may be noticed after that of its processes."""
        until = time.monotonic() + DEPARTURE_SECONDS
        while not await self._in_thread(node_is_gone, slot.node_id, error):
            if time.monotonic() > until or self._state(slot) is CardState.LEAVING:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    def _state(self, slot: Slot) -> CardState:
        return self.schedule.state(slot.number)

    def _kill(self, slot: Slot) -> None:
        if slot.starting is not None:
            slot.starting.cancel()
            slot.starting = None
        slot.actor = None
        self._tell_ray(self._places.kill, slot)

    def _fault(self, slot: Slot, what: str) -> None:
        log.warning("%s %s", slot.where, what)
        self._account.fault(slot, what)

    # -- decisions ----------------------------------------------------------------------------------------------

    def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Assign):
                slot = self._slots[decision.card]
                self._spawn(self._assign(slot, slot.actor, decision.task))
            elif isinstance(decision, Recall):
                self._spawn(self._recall(self._slots[decision.card].actor, decision.attempt))
            elif isinstance(decision, Commit):
                commit = self.loop.create_task(self._guarded(self._commit(decision.attempt)))
                self._commits.add(commit)
                commit.add_done_callback(self._commits.discard)
            elif isinstance(decision, Discard):
                log.warning("attempt %s is dropped: rows that failed in it could be made after all", decision.attempt)
                del self._records[decision.attempt]
            elif isinstance(decision, CheckStorage):
                self._spawn(self._check_storage(decision.shard))
            elif isinstance(decision, Replace):
                self._kill(self._slots[decision.card])
                self._start(self._slots[decision.card])
            elif isinstance(decision, Quarantine):
                slot = self._slots[decision.card]
                log.error("%s is quarantined: %s", slot.where, decision.reason)
                self._kill(slot)
            elif isinstance(decision, Release):
                slot = self._slots[decision.card]
                log.info("%s is released, as its node leaves", slot.where)
                self._kill(slot)
                self._give_back(slot)
            elif isinstance(decision, Finish) and not self._over.done():
                self._over.set_result(decision.reason)

    async def _assign(self, slot: Slot, actor: Any, task: ShardTask) -> None:
        async with slot.assigning:
            while True:
                try:
                    return await actor.assign.remote(slot.name, task)  # type: ignore[no-any-return]
                except ActorUnavailableError:
                    # It may have arrived or not; a card takes the same attempt once.
                    await asyncio.sleep(NEWS_SECONDS)
                except RayError:
                    return None

    async def _recall(self, actor: Any, attempt: str) -> None:
        while True:
            try:
                given_back = await actor.recall.remote(attempt)
                break
            except ActorUnavailableError:
                await asyncio.sleep(NEWS_SECONDS)  # a card answers the same again
            except RayError:
                return
        self._carry_out(self.schedule.recalled(attempt, given_back))

    async def _check_storage(self, shard: Shard) -> None:
        """Looks whether storage fails for this process, too, as a card says it does: at all, or at the shard's rows."""
        prompts, output = self._setup.dataset, self._ledger.storage
        # Named as this driver's attempts are, so that it is removed with what these leave behind.
        probe = f"images/{attempt_name(shard.number, f'{self.schedule.prefix}0')}"

        def check() -> str | None:
            output.once().put(f"{probe}/probe", bytes(PROBE_BYTES))
            with contextlib.suppress(StorageError):
                output.once().remove(probe)
            output.once().get("run.json")
            prompts.require_unchanged(shard.file, storage=prompts.storage.once())
            try:
                prompts.read_bytes(shard)
            except StorageError as error:
                return str(error)
            return None

        try:
            of_shard = await self._in_thread(check)
        except StorageError as error:
            self._carry_out(self.schedule.storage_checked(shard.number, str(error)))
        else:
            self._carry_out(self.schedule.storage_checked(shard.number, None, of_shard))

    async def _commit(self, attempt: str) -> None:
        done = self._records[attempt]
        self._ledger.unsettled.add(attempt)

        def commit() -> tuple[bool, pa.Table | None]:
            put = self._ledger.commit(done.facts, done.manifest)
            return put, read_manifest(done.manifest)[0] if done.facts.failed_rows else None

        put, table = await self.loop.run_in_executor(self._commit_pool, commit)
        del self._records[attempt]
        if put:
            self._account.committed(done.facts, table)
        else:
            log.warning("shard %d: another driver has committed it, so its manifest stays", done.facts.shard)
        self._carry_out(self.schedule.committed(done.facts.shard))

    # -- clocks -------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Kills cards that have passed a limit, ends the waiting of those that differ, and says how it goes."""
        looked = said = time.monotonic()
        while True:
            late = time.monotonic() - looked - LOOK_SECONDS
            looked += LOOK_SECONDS + late
            for slot in self._slots.values():
                if late > LOOK_SECONDS:
                    slot.heard += late  # this process stood still, and heard nobody
                if slot.actor is None or slot.passed:
                    continue
                since_heard = time.monotonic() - slot.heard
                slot.passed = passed_limit(
                    slot.status, since_heard, self._news_s, self._setup.config, self._batch_times
                )
                if slot.passed:
                    self._tell_ray(self._places.kill, slot)
            self._settle_stack()
            patience = self._setup.config.limits.cluster
            if self._asking is not None and time.monotonic() - self._asking > patience:
                self.abandon(f"Ray has not answered for {patience:g} s (limits.cluster)")
            cards = self._doings()
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                for line in self._watch.due(cards):
                    log.warning("%s", line)
            self._view.show(self._account.progress(self._slots.values(), cards, self._waits_for(cards)))
            await asyncio.sleep(LOOK_SECONDS)

    async def _report(self) -> None:
        while True:
            await self._in_thread(self._ledger.hold)
            await self._in_thread(self._ledger.put_json, "progress.json", self._describe("running"))
            await asyncio.sleep(PROGRESS_SECONDS)

    def _describe(self, state: str) -> dict[str, Any]:
        cards = self._doings() if state == "running" else {}
        waits_for = self._waits_for(cards) if state == "running" else None
        return self._account.describe(self._slots.values(), cards, waits_for, state)

    def _doings(self) -> dict[str, list[Doing]]:
        """What each card is at, by its label."""
        now, config = time.monotonic(), self._setup.config
        return {
            slot.label: doings(slot, self._state(slot), now, self._news_s, self._need, config, self._batch_times)
            for slot in self._slots.values()
        }

    def _waits_for(self, cards: Mapping[str, Sequence[Doing]]) -> str | None:
        storage_s = self._ledger.storage.longest_running_s()
        return waits_for(cards.values(), len(self._slots_in(CardState.READY)), storage_s, self._need)
