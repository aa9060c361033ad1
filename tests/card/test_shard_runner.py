"""Which row is at fault when a pipeline call raises, and that all calls have one shape."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gaudi_batch.card.shard_runner import CardFault, ShardMaker, ShardRows
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.rows import PromptRow
from gaudi_batch.pipelines.base import DeviceError, Generated, Item
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.scheduling.decisions import ShardTask

BUCKET = Bucket(8, 8, 1, 1.0)


def rows(count: int, images: int = 1) -> list[PromptRow]:
    return [PromptRow(n, str(n), f"p{n}", "", None, BUCKET, images, None) for n in range(count)]


class Device:
    """Paints by row; raises for some rows, or once it is broken; paints others black or not finite."""

    def __init__(self, raises: Set[int] = frozenset(), black: Set[int] = frozenset(), nan: Set[int] = frozenset(),
                 nsfw: Set[int] = frozenset(), broken: bool = False) -> None:  # fmt: skip
        self.raises, self.black, self.nan, self.nsfw, self.broken = raises, black, nan, nsfw, broken
        self.calls: list[list[int]] = []

    def __call__(self, items: list[Item]) -> Generated:
        self.calls.append([item.row for item in items])
        if self.broken or self.raises & set(self.calls[-1]):
            raise RuntimeError("boom")
        images = np.stack([np.full((8, 8, 3), (2 + item.row) / 255, np.float32) for item in items])
        for place, item in enumerate(items):
            if item.row in self.black | self.nsfw:
                images[place] = 0
            if item.row in self.nan:
                images[place, 3, 3, 1] = np.nan
        return Generated(images, [item.row in self.nsfw for item in items], [False] * len(items))


def made(maker: ShardMaker) -> list[tuple[int, int]]:
    return [(image.item.row, image.item.image) for batch in maker.batches() for image in batch]


def maker(device: Callable[..., Any], count: int, **settings: Any) -> ShardMaker:
    images = settings.pop("images", 1)
    known = {name: settings.pop(name) for name in list(settings) if name not in ("announce", "control", "suspect")}
    known["announce"] = settings.pop("suspect", False)
    task = ShardTask(Shard(0, 0, 0, count, BUCKET, count, count * images), "a1", **known)
    config = JobConfig(prompts="p", output="o", device="simulated", batch_size=4, seed=0)
    return ShardMaker(ShardRows(task, rows(count, images), pa.table({})), config, device, **settings)


def test_every_call_is_a_whole_batch() -> None:
    device = Device()
    assert made(maker(device, 6)) == [(n, 0) for n in range(6)]
    assert device.calls == [[0, 1, 2, 3], [4, 5, 5, 5]]


def test_a_row_that_raises_fails_alone() -> None:
    device = Device(raises={2})
    shard = maker(device, 8)
    assert sorted(made(shard)) == [(n, 0) for n in range(8) if n != 2]
    assert shard.failures == {2: "RuntimeError: boom"}
    assert all(len(call) == 4 for call in device.calls)


def test_the_last_row_is_shown_to_be_at_fault_by_making_an_earlier_one_again() -> None:
    device = Device(raises={5})
    shard = maker(device, 6)
    made(shard)
    assert set(shard.failures) == {5}
    assert device.calls[-1] == [4, 4, 4, 4]


def test_where_nothing_works_the_rows_have_only_failed_once() -> None:
    shard = maker(Device(broken=True), 3)
    with pytest.raises(CardFault) as caught:
        made(shard)
    assert set(caught.value.failed_alone_once) == {0, 1, 2}
    assert shard.failures == {}


def test_a_card_that_can_not_repeat_what_it_made_is_at_fault_itself() -> None:
    device = Device()
    shard = maker(device, 12)
    batches = shard.batches()
    next(batches)
    device.broken = True
    with pytest.raises(CardFault) as caught:
        list(batches)
    assert caught.value.failed_alone_once == {}
    assert len(device.calls) < 12


def test_a_row_that_failed_alone_once_and_raises_alone_again_is_failed() -> None:
    shard = maker(Device(broken=True), 2, failed_alone_once={0: "before", 1: "before"})
    assert made(shard) == []
    assert set(shard.failures) == {0, 1}


def test_a_row_that_failed_alone_once_and_works_here_is_made() -> None:
    shard = maker(Device(), 2, failed_alone_once={0: "before"})
    assert sorted(made(shard)) == [(0, 0), (1, 0)]
    assert shard.failures == {}


def test_a_row_that_is_to_fail_without_running_is_not_tried() -> None:
    device = Device()
    shard = maker(device, 3, fail_without_running={1: "it killed"})
    assert made(shard) == [(0, 0), (2, 0)]
    assert shard.failures == {1: "it killed"}
    assert all(1 not in call for call in device.calls)


def test_a_row_fails_whole_with_all_its_images() -> None:
    device = Device(raises={1})
    shard = maker(device, 3, images=3)
    assert {row for row, _ in made(shard)} == {0, 2}
    assert set(shard.failures) == {1}


@pytest.mark.parametrize(("wrong", "message"), [("nan", "not finite"), ("black", "black")])
def test_an_image_that_is_wrong_twice_is_for_another_card_to_judge(wrong: str, message: str) -> None:
    kind: dict[str, Any] = {wrong: {2}}
    device = Device(**kind)
    shard = maker(device, 4)
    assert len(made(shard)) == 3
    assert device.calls == [[0, 1, 2, 3], [2, 2, 2, 2]]
    assert message in shard.doubted[2]
    assert shard.failures == shard.doubted
    assert shard.transient_failures == 0


@pytest.mark.parametrize("known", [{"failed_alone_once": {2: "black"}}, {"confirm": frozenset({2})}])
def test_an_image_that_is_wrong_on_a_second_card_fails_its_row(known: dict[str, Any]) -> None:
    shard = maker(Device(nan={2}), 4, **known)
    made(shard)
    assert "not finite" in shard.failures[2]
    assert not shard.doubted
    assert shard.raised == {2}


class Moody(Device):
    """Does wrong only in the calls that are named."""

    def __init__(self, *moods: dict[str, Any]) -> None:
        super().__init__()
        self.moods = [*moods]

    def __call__(self, items: list[Item]) -> Generated:
        mood = self.moods.pop(0) if self.moods else {}
        calm = self.raises, self.black, self.nan
        self.raises, self.black, self.nan = (mood.get(name, set()) for name in ("raises", "black", "nan"))
        try:
            return super().__call__(items)
        finally:
            self.raises, self.black, self.nan = calm


@pytest.mark.parametrize("mood", [{"nan": {2}}, {"black": {2}}, {"raises": {2}}])
def test_what_works_when_it_is_made_again_costs_no_row_and_counts_against_the_card(mood: dict[str, Any]) -> None:
    device = Moody({}, mood)
    device.moods = [mood]
    shard = maker(device, 6)
    assert sorted(made(shard)) == [(n, 0) for n in range(6)]
    assert shard.failures == {}
    assert shard.transient_failures == 1


def test_a_card_whose_every_image_is_wrong_accuses_its_rows_and_decides_nothing() -> None:
    shard = maker(Device(nan=set(range(12))), 8)
    with pytest.raises(CardFault) as caught:
        made(shard)
    assert set(caught.value.failed_alone_once) == set(range(8))
    assert shard.failures == {}


def test_a_card_that_begins_to_paint_wrong_is_found_out_by_what_it_made_before() -> None:
    device = Device()
    shard = maker(device, 64)
    batches = shard.batches()
    next(batches)
    device.nan = set(range(64))
    with pytest.raises(CardFault) as caught:
        list(batches)
    assert caught.value.failed_alone_once == {}
    assert len(device.calls) <= 1 + 1 + 4 + 1


def test_a_card_that_can_make_nothing_confirms_nothing() -> None:
    shard = maker(Device(nan={-1, 0, 1, 2}), 3, confirm=frozenset({1}))
    with pytest.raises(CardFault) as caught:
        made(shard)
    assert caught.value.failed_alone_once == {}


def test_to_confirm_a_row_no_other_is_made() -> None:
    device = Device()
    shard = maker(device, 8, confirm=frozenset({5}))
    assert made(shard) == [(5, 0)]
    assert device.calls == [[5, 5, 5, 5]]
    assert shard.failures == {}


def test_each_image_that_is_made_again_is_announced() -> None:
    order: list[Any] = []
    made(maker(Device(nan={1}), 3, announce=order.append, suspect=True))
    assert order == [(), (0, 1, 2), (1,)]


def test_what_the_safety_checker_blackens_is_ok() -> None:
    shard = maker(Device(nsfw={2}), 4)
    flags = {image.item.row: image.nsfw for batch in shard.batches() for image in batch}
    assert flags == {0: False, 1: False, 2: True, 3: False}
    assert shard.failures == {}


def test_each_batch_is_announced_before_its_call() -> None:
    order: list[Any] = []
    device = Device()

    def call(items: list[Item]) -> Generated:
        order.append("call")
        return device(items)

    made(maker(call, 6, announce=order.append, alone=frozenset({4, 5})))
    assert order == [(0, 1, 2, 3), "call", (4,), "call", (5,), "call"]


def test_a_device_that_fails_is_no_rows_fault() -> None:
    def fail(items: list[Item]) -> Generated:
        raise DeviceError("out of device memory")

    shard = maker(fail, 3)
    with pytest.raises(DeviceError):
        made(shard)
    assert shard.failures == {}


def test_a_suspect_shard_begins_with_a_control_that_is_announced_as_no_row() -> None:
    order: list[Any] = []
    device = Device()

    def call(items: list[Item]) -> Generated:
        order.append([item.row for item in items])
        return device(items)

    assert made(maker(call, 2, announce=order.append, suspect=True)) == [(0, 0), (1, 0)]
    assert order == [(), [-1] * 4, (0, 1), [0, 1, 1, 1]]


def test_a_card_that_can_not_make_the_control_of_a_suspect_shard_accuses_no_row() -> None:
    shard = maker(Device(broken=True), 2, suspect=True)
    with pytest.raises(CardFault) as caught:
        made(shard)
    assert caught.value.failed_alone_once == {}
