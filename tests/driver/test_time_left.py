"""The time that a run has left lies in the range that is told, as often as is told."""

from __future__ import annotations

import heapq
import math
import random
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.driver.time_left import MIN_HISTORY_S, Rate, TimeLeft

BATCH = 8
BATCH_S = 9.0


class Told(NamedTuple):
    done: float
    """Share of the images."""
    left: TimeLeft
    true_s: float


def play(
    seed: int, hours: float, cards: int = 8, noise: float = 0.01, slower: float = 1.0, lost: int = 0
) -> list[Told]:
    """A run of cards that make a batch after the other: how long it was to take, at 30 moments, and how long it took.

    Args:
        seed: of the noise.
        hours: about how long it takes.
        cards: that are there from the start.
        noise: standard deviation of the logarithm of a batch's time.
        slower: by what the rate is multiplied once half is made.
        lost: cards that go then.
    """
    rng, rate = random.Random(seed), Rate()
    total = int(hours * 3600 * cards / BATCH_S) * BATCH
    ends = [(BATCH_S * rng.uniform(0.9, 1.1), card) for card in range(cards)]
    images, second, told = 0, 0.0, list[tuple[float, float, TimeLeft]]()
    while images < total:
        end, card = heapq.heappop(ends)
        is_late = images > total / 2
        present = cards - lost if is_late else cards
        while second < end:
            rate.note(second, images, present)
            if images / total >= (len(told) + 1) / 31:
                told.append((second, images / total, rate.left(total - images)))
            second += 5.0
        if card < present:
            images += BATCH
            speed = slower if is_late else 1.0
            heapq.heappush(ends, (end + BATCH_S / speed * math.exp(rng.gauss(0.0, noise)), card))
    return [Told(done, left, end - when) for when, done, left in told]


def share_in_range(told: list[Told]) -> float:
    ranges = [each for each in told if each.left.low is not None and each.left.high is not None]
    assert len(ranges) > 0.8 * len(told)
    return sum((each.left.low or 0) <= each.true_s <= (each.left.high or 0) for each in ranges) / len(ranges)


@pytest.mark.parametrize("noise", [0.01, 0.3])
@pytest.mark.parametrize("cards", [1, 8])
def test_nine_times_in_ten_the_end_lies_in_the_range(cards: int, noise: float) -> None:
    told = [each for seed in range(10) for each in play(seed, 0.5, cards, noise)]
    assert share_in_range(told) >= 0.9
    widths = sorted(((each.left.high or 0) - (each.left.low or 0)) / each.true_s for each in told if each.left.high)
    assert widths[len(widths) // 2] < 0.5, "a range that says something"


def test_a_run_that_slows_down_is_believed_soon_after() -> None:
    told = [each for seed in range(10) for each in play(seed, 1.0, slower=0.6) if each.done > 0.6]
    assert share_in_range(told) >= 0.75


def test_cards_that_go_are_reckoned_with_at_once() -> None:
    told = [each for seed in range(10) for each in play(seed, 1.0, lost=2) if each.done > 0.51]
    assert share_in_range(told) >= 0.9
    assert all(abs((each.left.seconds or 0) - each.true_s) < 0.1 * each.true_s + BATCH_S for each in told)


def test_nothing_is_said_of_what_is_not_known() -> None:
    rate = Rate()
    assert rate.left(100) == TimeLeft(None)
    rate.note(0.0, 0, 2)
    rate.note(5.0, 0, 2)
    assert rate.left(100) == TimeLeft(None), "no image is made"
    for second in range(6, int(MIN_HISTORY_S)):
        rate.note(float(second), second, 2)
    known = rate.left(100)
    assert known.seconds == pytest.approx(100.0, rel=0.1)
    assert (known.low, known.high) == (None, None), "too little for a range"
    rate.note(MIN_HISTORY_S, int(MIN_HISTORY_S), 0)
    assert rate.left(100) == TimeLeft(None), "no card is left"
    assert rate.left(0) == rate.left(-3) == TimeLeft(0.0, 0.0, 0.0)


@pytest.mark.parametrize("batch_s", [9.0, 90.0, 400.0])
def test_the_rate_of_long_batches_is_known_between_them(batch_s: float) -> None:
    rate = Rate()
    for second in range(int(batch_s * 12)):
        rate.note(float(second), 8 * int(second / batch_s), 1)
        if second > 6 * batch_s:
            assert rate.images_per_s() == pytest.approx(8 / batch_s, rel=0.15)
            assert rate.left(80).seconds == pytest.approx(10 * batch_s, rel=0.35)
    for second in range(int(batch_s * 12), int(batch_s * 24)):
        rate.note(float(second), 88, 1)
    assert (rate.images_per_s() or 0) < 0.3 * 8 / batch_s, "a run that stands still is no fast one"


@given(st.lists(st.tuples(st.floats(0, 400), st.integers(0, 10_000), st.integers(0, 64)), max_size=60), st.integers(0))
def test_whatever_happens_there_is_an_answer(moments: list[tuple[float, int, int]], images: int) -> None:
    rate, now, made = Rate(), 0.0, 0
    for seconds, more, cards in moments:
        now, made = now + seconds, made + more
        rate.note(now, made, cards)
        per_s, left = rate.images_per_s(), rate.left(images)
        assert per_s is None or 0 < per_s < math.inf
        known = [value for value in (left.low, left.seconds, left.high) if value is not None]
        assert known == sorted(known)
        assert all(0 <= value < math.inf for value in known)
