"""Runs the steps of an export in parallel, on this machine or on the nodes of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol, TypeVar

from gaudi_batch.storage.store import Storage

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL_THREADS = 4
"""Items that this machine works on at the same time."""


class ForEach(Protocol):
    """Calls a function with storages and each item; yields an item and its result as they come."""

    def __call__(
        self, function: Callable[..., Result], storages: Sequence[Storage], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Result]]:
        """Raises what the function raises."""


@contextlib.contextmanager
def workers(address: str | None) -> Iterator[ForEach]:
    """What works.

    Args:
        address: of a Ray cluster whose nodes do; None is this process.

    Raises:
        InputError: no cluster answers.
    """
    if address is None:
        yield _here
        return
    from gaudi_batch.cluster.connection import attached

    with attached(address):
        yield _on_cluster


def _here(
    function: Callable[..., Result], storages: Sequence[Storage], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    with ThreadPoolExecutor(LOCAL_THREADS, "export") as pool:
        running = {pool.submit(function, *storages, item): item for item in items}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _on_cluster(
    function: Callable[..., Result], storages: Sequence[Storage], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    import ray
    from ray.exceptions import RayTaskError

    remote: Any = ray.remote(function).options(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")
    references = [ray.put(storage) for storage in storages]
    running = {remote.remote(*references, item): item for item in items}
    while running:
        ended, _ = ray.wait(list(running))
        for reference in ended:
            item = running.pop(reference)
            try:
                result = ray.get(reference)
            except RayTaskError as error:
                for other in running:
                    ray.cancel(other)
                raise error.as_instanceof_cause() from None
            yield item, result
