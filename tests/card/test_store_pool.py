"""Images are stored in order, by as few threads as keep up with the device."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

from gaudi_batch.card import store_pool
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

    def end(self) -> None:
        assert self.begun.wait(60)
        self.goes_on.set()


def begun(tasks: list[Task], count: int) -> list[int]:
    """Which tasks have begun, once the first `count` of them have."""
    for task in tasks[:count]:
        assert task.begun.wait(60)
    return [number for number, task in enumerate(tasks) if task.begun.is_set()]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> StorePool:
    """A pool whose tasks have taken a second each."""
    made = StorePool(THREADS)
    made.submit(lambda: None).result(60)
    made._task_s = 1.0
    monkeypatch.setattr(store_pool, "NEWEST_SHARE", 0.0)
    return made


@pytest.mark.parametrize(
    ("tasks", "seconds", "width"), [(8, 8.0, 1), (8, 100.0, 1), (8, 4.5, 2), (8, 2.0, 4), (8, 0.1, 4), (8, 0.0, 4)]
)
def test_as_many_threads_work_as_keep_up(tasks: int, seconds: float, width: int, pool: StorePool) -> None:
    pool.keep_up(tasks, seconds)
    assert pool.width == width
    given = [Task() for _ in range(tasks)]
    futures = [pool.submit(task) for task in given]
    assert begun(given, width) == list(range(width))
    given[0].end()
    assert begun(given, width + 1) == list(range(width + 1)), "one by one, in order"
    for task in given[1:]:
        task.goes_on.set()
    assert [future.result(60) for future in futures] == [1] * tasks


def test_what_is_not_known_to_take_little_gets_all_threads() -> None:
    pool = StorePool(THREADS)
    pool.keep_up(8, 1000.0)
    assert pool.width == THREADS


def test_who_waits_has_all_threads_work(pool: StorePool) -> None:
    pool.keep_up(8, 1000.0)
    given = [Task() for _ in range(8)]
    for task in given:
        pool.submit(task)
    assert begun(given, 1) == [0]
    pool.widen()
    assert begun(given, THREADS) == list(range(THREADS))
    given[0].end()
    assert begun(given, THREADS + 1) == list(range(THREADS + 1)), "until there is another batch"
    pool.keep_up(8, 1000.0)
    assert pool.width == 1
    for task in given:
        task.goes_on.set()


def test_tasks_that_take_longer_than_before_get_more_threads(pool: StorePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_pool, "NEWEST_SHARE", 1.0)
    pool.keep_up(8, 1e-9)
    assert pool.width == THREADS
    pool._task_s = 0.0
    pool.keep_up(8, 1e-9)
    assert pool.width == 1
    pool.submit(lambda: None).result(60)
    pool.submit(lambda: None).result(60)
    assert pool.width == THREADS


def test_what_a_task_raises_reaches_its_future_and_the_next_one_runs(pool: StorePool) -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    pool.keep_up(2, 1000.0)
    failed, good = pool.submit(fail), pool.submit(lambda: 2)
    with pytest.raises(OSError, match="the disk is full"):
        failed.result(60)
    assert good.result(60) == 2


def test_the_pixels_of_an_image_that_is_stored_are_not_kept(pool: StorePool) -> None:
    class Pixels:
        pass

    def store(pixels: Any) -> None:
        assert pixels is not None

    pixels = Pixels()
    reference = weakref.ref(pixels)
    pool.submit(store, pixels).result(60)
    del pixels
    pool.submit(lambda: None).result(60)
    gc.collect()
    assert reference() is None
