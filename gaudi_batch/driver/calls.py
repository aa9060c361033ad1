"""Calls of a card's actor, repeated until it answers or is gone, alone or with its node."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import ActorUnavailableError, RayError

from gaudi_batch.driver.slot import Slot
from gaudi_batch.scheduling.decisions import ShardTask

RETRY_INTERVAL_S = 1.0
"""Seconds between two calls of an actor that can't be reached."""
DEPARTURE_TIMEOUT_S = 3.0
"""Seconds that the cluster may take to notice the end of a node after that of its card."""
NODE_INTERVAL_S = 0.5
"""Seconds between two questions for that."""


async def send(slot: Slot, actor: Any, task: ShardTask) -> None:
    """Sends a shard, after those that were sent before."""
    async with slot.assigning:
        while True:
            try:
                return await actor.assign.remote(slot.name, task)  # type: ignore[no-any-return]
            except ActorUnavailableError:
                # It may have arrived or not; a card takes an attempt once, however often it is sent.
                await asyncio.sleep(RETRY_INTERVAL_S)
            except RayError:
                return None


async def call_until_answered(method: Any, *arguments: Any) -> Any:
    """Calls a method of a card that may be called again; returns its answer, or None if the card is gone."""
    while True:
        try:
            return await method.remote(*arguments)
        except ActorUnavailableError:
            await asyncio.sleep(RETRY_INTERVAL_S)
        except RayError:
            return None


async def ask_back(actor: Any, attempt: str) -> bool | None:
    """Asks a card to give a shard back; returns whether it does, or None if the card is gone."""
    answer = await call_until_answered(actor.recall, attempt)  # it gives the same answer again
    return None if answer is None else bool(answer)


async def node_went(is_gone: Callable[[], Awaitable[bool]], is_leaving: Callable[[], bool]) -> bool:
    """Whether a card died because its node did, which the cluster may notice later.

    Args:
        is_gone: asks the cluster whether the node is gone.
        is_leaving: whether the card leaves anyway, so that nothing depends on it.
    """
    until = time.monotonic() + DEPARTURE_TIMEOUT_S
    while not await is_gone():
        if time.monotonic() > until or is_leaving():
            return False
        await asyncio.sleep(NODE_INTERVAL_S)
    return True
