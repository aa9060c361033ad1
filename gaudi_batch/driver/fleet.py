"""The cards of a run in the cluster: their places, their processes, and what the processes report.

A task polls each process; what it reports becomes events of the schedule. Calls of Ray's control service run in a
thread beside the event loop.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from gaudi_batch.card.messages import Broken, CardReport, Done, Dropped, Message, Ready
from gaudi_batch.cluster.connection import cluster_capacity
from gaudi_batch.cluster.placement import node_is_gone, why_died
from gaudi_batch.driver.background import Background
from gaudi_batch.driver.calls import ask_back, call_until_answered, node_went, send
from gaudi_batch.driver.doing import Doing, doings
from gaudi_batch.driver.places import CardsOfRun
from gaudi_batch.driver.progress import RunProgress
from gaudi_batch.driver.slot import Slot, card_name
from gaudi_batch.driver.watchdog import PhaseRules, passed_limit
from gaudi_batch.redaction import redact
from gaudi_batch.scheduling import decisions, events
from gaudi_batch.scheduling.cards import CardState
from gaudi_batch.scheduling.schedule import Schedule

log = logging.getLogger(__name__)

CARD_POLL_INTERVAL_S = 1.0
"""Seconds after which a card with nothing to report answers a poll; grows with the number of cards."""
CARDS_PER_POLL_SECOND = 100
CLUSTER_INTERVAL_S = 2.0
"""Seconds between two looks at what the cluster has."""
MIN_PLACE_INTERVAL_S = 0.05
"""Least number of seconds between two questions which slots have their places."""
PLACE_SHARE = 0.1
"""The next question waits for this share of the time that the newest slot has waited."""
FIRST_WAIT_LINE_S = 30.0
"""Seconds until the log says that cards wait for the cluster; it says so again after twice as long."""
CLOSE_TIMEOUT_S = 30.0
"""Seconds that the end of a run waits for Ray to take back the places of its cards."""


class Fleet:
    """The cards of a run.

    Args:
        cards: what the cards are.
        schedule: the state of the run, which is only read.
        progress: is told of cards that work, and of faults.
        background: tasks and threads.
        tell: tells the schedule what happened, and carries out what it decides.
        keep: keeps the record of a shard that is made.
    """

    def __init__(
        self,
        cards: CardsOfRun,
        schedule: Schedule,
        progress: RunProgress,
        background: Background,
        tell: Callable[[events.Event], None],
        keep: Callable[[Done], None],
    ) -> None:
        self._began = time.monotonic()
        self.slots: dict[int, Slot] = {}
        setup, resources = cards.setup, cards.resources
        self.rules = PhaseRules(setup.job.config, f"{resources.amount} {resources.name}", CARD_POLL_INTERVAL_S)
        self._schedule = schedule
        self._progress = progress
        self._background = background
        self._tell = tell
        self._keep = keep
        self._places = cards.places
        self._cluster_capacity = functools.partial(cluster_capacity, setup.job.config, resources)
        self._notes: set[str] = set()
        self._asked = asyncio.Event()  # cards were asked for

    # -- the cluster --------------------------------------------------------------------------------------------

    async def follow_cluster(self) -> None:
        """Tells the schedule again and again what the cluster has."""
        while True:
            capacity = await self._background.ask_ray(self._cluster_capacity)
            self._tell(events.ClusterSeen(capacity, time.monotonic()))
            await asyncio.sleep(CLUSTER_INTERVAL_S)

    async def place(self) -> None:
        """Starts the first process of each slot that the cluster has placed, and logs how long the others wait."""
        next_line = FIRST_WAIT_LINE_S
        while True:
            unplaced = self._in_states(CardState.WAITING)
            if unplaced:
                placed = await self._background.ask_ray(self._places.placed, [slot.number for slot in unplaced])
                for slot in self._in_states(CardState.WAITING):
                    if slot.number in placed:
                        slot.node_id, slot.placed = placed[slot.number], self._places.placed_at[slot.number]
                        self._tell(events.CardPlaced(slot.number, slot.node_id))
                        self._start(slot)
                unplaced = self._in_states(CardState.WAITING)
            if not unplaced:
                next_line = FIRST_WAIT_LINE_S
                self._asked.clear()
                await self._asked.wait()
                continue
            waits = [time.monotonic() - slot.since for slot in unplaced]
            if max(waits) > next_line:
                next_line *= 2
                subject = f"{unplaced[0].where} has" if len(waits) == 1 else f"{len(waits)} cards have"
                log.info("%s waited %.0f s for the cluster: no %s is free", subject, max(waits), self.rules.need)
            pause = max(MIN_PLACE_INTERVAL_S, PLACE_SHARE * min(waits))
            await asyncio.sleep(min(pause, CLUSTER_INTERVAL_S))

    async def close(self) -> None:
        """Gives all places back, with the processes in them."""
        for slot in self.slots.values():
            slot.actor = None
        await self._background.close_ray(self._places.close, CLOSE_TIMEOUT_S)

    # -- what the schedule decides ------------------------------------------------------------------------------

    def ask_for(self, decision: decisions.AskForCards) -> None:
        """Asks the cluster for cards."""
        self.slots.update({number: Slot(number) for number in decision.cards})
        self._count_slots()
        self._background.tell_ray(self._places.create, decision.cards)
        self._asked.set()

    def drop(self, decision: decisions.DropCards) -> None:
        """Asks for these cards no longer."""
        for number in decision.cards:
            self._background.tell_ray(self._places.remove, number)
            del self.slots[number]
        self._count_slots()

    def admit(self, decision: decisions.Admit) -> None:
        """Lets a card work."""
        slot = self.slots[decision.card]
        assert slot.ready is not None
        self._progress.introduce(slot)
        self.rules.times.loaded(slot.ready.load_s)
        threads = "" if slot.ready.threads is None else f", with {slot.ready.threads} threads"
        log.info("%s is ready after %.1f s%s", slot.where, slot.ready.load_s, threads)
        for note in slot.ready.notes:
            if note not in self._notes:
                self._notes.add(note)
                log.warning("%s: %s", slot.where, note)

    def hold_back(self, decision: decisions.HoldBack) -> None:
        """Lets a card wait for the others."""
        where = self.slots[decision.card].where
        log.warning("%s waits for what the other cards have: %s", where, decision.reason)

    def replace(self, decision: decisions.Replace) -> None:
        """Starts another process in a card's place."""
        slot = self.slots[decision.card]
        self._kill(slot)
        self._start(slot)

    def quarantine(self, decision: decisions.Quarantine) -> None:
        """Holds a card's place, with no process in it."""
        slot = self.slots[decision.card]
        log.error("%s is quarantined: %s", slot.where, decision.reason)
        self._kill(slot)

    def release(self, decision: decisions.Release) -> None:
        """Gives back the place of a card that has nothing more to do."""
        slot = self.slots[decision.card]
        if self._schedule.stop_reason is not None:
            log.debug("%s is released, as the run stops", slot.where)  # there may be thousands
        else:
            log.info("%s is released, as its node leaves", slot.where)
        self._kill(slot)
        self._give_back(slot)

    def give_back(self, decision: decisions.GiveBack) -> None:
        """Gives back the place of a card whose node has gone."""
        slot = self.slots[decision.card]
        log.warning("%s left with its node", slot.where)
        self._give_back(slot)

    def assign(self, decision: decisions.Assign) -> None:
        """Sends a shard to a card."""
        slot, task = self.slots[decision.card], decision.task
        if task.backup_of is not None:
            log.info("shard %d takes longer than it should; %s makes it, too", task.shard.number, slot.where)
        self._background.spawn(send(slot, slot.actor, task))

    def end_attempt(self, decision: decisions.Drop) -> None:
        """Tells a card to drop an attempt."""
        actor = self.slots[decision.card].actor
        if actor is not None:
            self._background.spawn(call_until_answered(actor.drop, decision.attempt))

    def recall(self, decision: decisions.Recall) -> None:
        """Asks a card for a shard back."""
        self._background.spawn(self._recall(self.slots[decision.card].actor, decision.attempt))

    async def _recall(self, actor: Any, attempt: str) -> None:
        given_back = await ask_back(actor, attempt)
        if given_back is not None:
            self._tell(events.RecallAnswered(attempt, given_back))

    def fault(self, number: int, error: str, *, quiet: bool = False) -> None:
        """Notes that a card failed.

        Args:
            number: which.
            error: what happened.
            quiet: whether the log says it elsewhere.
        """
        slot = self.slots[number]
        if not quiet:
            log.warning("%s %s", slot.where, error)
        self._progress.fault(slot, error)

    # -- processes ----------------------------------------------------------------------------------------------

    def _start(self, slot: Slot) -> None:
        slot.forget_process()
        slot.starting = self._background.spawn(self.begin(slot))

    async def begin(self, slot: Slot) -> None:
        """Starts a process in a slot, and polls it from then on."""
        try:
            slot.actor = await self._background.ask_ray(self._places.start, slot.number)
        except RayError as error:
            slot.starting = None
            await self._lost(slot, error)
            return
        # A process that has started early had nobody who heard it until now.
        slot.starting, slot.last_seen = None, max(self._began, self._places.started_at[slot.number])
        await self._listen(slot, slot.actor)

    async def _listen(self, slot: Slot, actor: Any) -> None:
        """Polls one card process until it dies or is replaced."""
        acknowledged = 0
        while slot.actor is actor:
            try:
                report: CardReport = await actor.poll.remote(acknowledged, self.rules.poll_s, time.time())
            except ActorUnavailableError:
                await asyncio.sleep(CARD_POLL_INTERVAL_S)
                continue
            except (RayActorError, RayError) as error:
                if slot.actor is actor:
                    await self._lost(slot, error)
                return
            if slot.actor is not actor:
                return
            slot.status, slot.last_seen = report.status, time.monotonic()
            self.rules.times.learn(report.status)
            for number, message in report.events:
                acknowledged = number
                if slot.actor is actor:  # an event may have replaced the process
                    self._take(slot, message)

    def _take(self, slot: Slot, message: Message) -> None:
        if isinstance(message, Ready):
            self.introduce(slot, message)
        elif isinstance(message, Broken):
            self.fault(slot.number, message.error)
            self._tell(events.CardBroken(slot.number, redact(message.error), message.storage, message.large))
        elif isinstance(message, Dropped) or (
            isinstance(message, (Done, events.ShardFailed)) and not self._schedule.is_live(message.attempt)
        ):
            self._tell(events.AttemptEnded(slot.number, message.attempt))
        elif isinstance(message, Done):
            self._keep(message)
            if failures := message.outcome.transient_failures:
                self.fault(slot.number, f"made wrong what was right when made again, {failures} times")
            self._tell(events.ShardMade(message.attempt, message.outcome))
        elif isinstance(message, events.ShardBegun):
            self._tell(replace(message, now=time.monotonic()))
        elif isinstance(message, events.ShardFailed):
            self.fault(slot.number, f"failed at {message.attempt}: {message.failure.error}")
            failure = replace(message.failure, error=redact(message.failure.error))
            self._tell(events.ShardFailed(message.attempt, failure))
        else:
            self._tell(message)

    def introduce(self, slot: Slot, ready: Ready) -> None:
        """Notes what a card's process says of itself once it has loaded."""
        before = slot.ready
        if before is None or (before.node_id, before.module) != (ready.node_id, ready.module):
            # Ray may have moved the place to another node meanwhile.
            slot.name = card_name(slot, ready, self.slots.values())
        slot.ready, slot.node_id, slot.up = ready, ready.node_id, True
        loaded = events.LoadedCard(
            slot.name, ready.node_id, ready.node, ready.module, dict(ready.stack), ready.model, ready.cpus
        )
        self._tell(events.CardLoaded(slot.number, loaded, time.monotonic()))

    async def _lost(self, slot: Slot, error: Exception) -> None:
        slot.up = False
        reason = slot.passed.reason if slot.passed else why_died(error)
        slow = slot.passed.slow if slot.passed else None
        is_gone = functools.partial(self._background.ask_ray, node_is_gone, slot.node_id, error)
        gone = not slot.passed and await node_went(is_gone, lambda: self._state(slot) is CardState.LEAVING)
        slot.actor = None
        if gone:
            self._tell(events.CardGone(slot.number))
            return
        if self._state(slot) is not CardState.LEAVING:  # else its node has ended it
            self.fault(slot.number, f"died: {reason}")
        self._tell(events.CardDied(slot.number, redact(reason), slow))

    def _kill(self, slot: Slot) -> None:
        if slot.starting is not None:
            slot.starting.cancel()
            slot.starting = None
        slot.actor = None
        slot.up = False
        self._background.tell_ray(self._places.kill, slot.number)

    def _give_back(self, slot: Slot) -> None:
        slot.given_back = time.monotonic()
        self._background.tell_ray(self._places.remove, slot.number)

    # -- what they are at ---------------------------------------------------------------------------------------

    def enforce_limits(self, late_s: float) -> None:
        """Kills the processes that have passed a limit.

        Args:
            late_s: seconds for which this process stood still, and heard nobody.
        """
        for slot in self.slots.values():
            slot.last_seen += late_s
            if slot.actor is None or slot.passed:
                continue
            slot.passed = passed_limit(slot.status, time.monotonic() - slot.last_seen, self.rules)
            if slot.passed:
                self._background.tell_ray(self._places.kill, slot.number)

    def doings(self) -> dict[str, list[Doing]]:
        """What each card is doing, by its label."""
        now = time.monotonic()
        return {slot.label: doings(slot, self._state(slot), now, self.rules) for slot in self.slots.values()}

    def count_ready(self) -> int:
        """How many cards work."""
        return len(self._in_states(CardState.READY))

    def _count_slots(self) -> None:
        self.rules.poll_s = max(CARD_POLL_INTERVAL_S, len(self.slots) / CARDS_PER_POLL_SECOND)

    def _state(self, slot: Slot) -> CardState:
        return self._schedule.state(slot.number)

    def _in_states(self, *states: CardState) -> list[Slot]:
        return [slot for slot in self.slots.values() if self._state(slot) in states]
