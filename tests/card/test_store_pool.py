"""Images are stored in order, by as few threads as keep up with the device."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

from gaudi_batch.card.store_pool import StorePool

THREADS = 4


class Task:
    """A task that lasts until it is let go."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def __call__(self) -> int:
        self.begun.set()
        assert self.goes_on.wait(60)
        return 1


def submitted(pool: StorePool, count: int) -> tuple[list[Task], list[Any]]:
    tasks = [Task() for _ in range(count)]
    return tasks, [pool.submit(task) for task in tasks]


def begun(tasks: list[Task], count: int) -> list[int]:
    """Which tasks have begun, once the first `count` of them have."""
    for task in tasks[:count]:
        assert task.begun.wait(60)
    return [number for number, task in enumerate(tasks) if task.begun.is_set()]


def end(tasks: list[Task], futures: list[Any]) -> None:
    for task in tasks:
        task.goes_on.set()
    assert [future.result(60) for future in futures] == [1] * len(tasks)


def wait_until_idle(pool: StorePool) -> None:
    """A thread that has ended its last task says so a moment later."""
    while True:
        with pool._lock:
            if not pool._working:
                return
        threading.Event().wait(0.001)


def narrowed(pool: StorePool) -> StorePool:
    for _ in range(THREADS):
        wait_until_idle(pool)
        pool.adjust()
    assert pool.limit == 1
    return pool


def test_all_threads_work_until_it_is_known_that_fewer_keep_up() -> None:
    pool = StorePool(THREADS)
    tasks, futures = submitted(pool, 8)
    assert begun(tasks, THREADS) == list(range(THREADS))
    tasks[0].goes_on.set()
    assert begun(tasks, THREADS + 1) == list(range(THREADS + 1)), "one by one, in order"
    end(tasks, futures)


def test_a_thread_fewer_works_for_each_batch_that_was_stored_in_time() -> None:
    pool = StorePool(THREADS)
    for limit in (3, 2, 1, 1):
        wait_until_idle(pool)
        pool.adjust()
        assert pool.limit == limit
        tasks, futures = submitted(pool, 8)
        assert begun(tasks, limit) == list(range(limit))
        end(tasks, futures)


def test_a_thread_more_works_where_images_wait_when_the_next_batch_comes() -> None:
    """Also where a task stands still, which has taken nobody knows how long."""
    pool = narrowed(StorePool(THREADS))
    tasks, futures = submitted(pool, 3)
    assert begun(tasks, 1) == [0]
    for limit in (2, 3):
        pool.adjust()
        assert pool.limit == limit
        assert begun(tasks, limit) == list(range(limit))
    pool.adjust()
    assert pool.limit == 3, "all that is left has a thread"
    end(tasks, futures)


def test_while_the_device_waits_all_threads_work_and_go_on() -> None:
    pool = narrowed(StorePool(THREADS))
    tasks, futures = submitted(pool, 8)
    assert begun(tasks, 1) == [0]
    pool.widen()
    assert begun(tasks, THREADS) == list(range(THREADS))
    pool.adjust()
    assert pool.limit == THREADS, "images still wait"
    end(tasks, futures)


def test_while_there_is_no_batch_to_make_all_threads_work_until_there_is_one() -> None:
    pool = narrowed(StorePool(THREADS))
    tasks, futures = submitted(pool, 5)
    assert begun(tasks, 1) == [0]
    pool.let_all_work()
    assert begun(tasks, THREADS) == list(range(THREADS))
    for task in tasks[:2]:
        task.goes_on.set()
    assert begun(tasks, 5) == list(range(5))
    end(tasks, futures)
    wait_until_idle(pool)
    pool.adjust()
    assert pool.limit == 1


def test_what_a_task_raises_reaches_its_future_and_the_next_one_runs() -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    pool = narrowed(StorePool(THREADS))
    failed, good = pool.submit(fail), pool.submit(lambda: 2)
    with pytest.raises(OSError, match="the disk is full"):
        failed.result(60)
    assert good.result(60) == 2


def test_the_pixels_of_an_image_that_is_stored_are_not_kept() -> None:
    class Pixels:
        pass

    def store(pixels: Any) -> None:
        assert pixels is not None

    pool = StorePool(THREADS)
    pixels = Pixels()
    reference = weakref.ref(pixels)
    pool.submit(store, pixels).result(60)
    del pixels
    wait_until_idle(pool)
    gc.collect()
    assert reference() is None
