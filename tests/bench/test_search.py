"""The batch size that is chosen: the smallest that is about as fast as any, as far as the device's memory goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.bench.rate import Rate
from gaudi_batch.bench.search import MIN_GAIN, NEAR_BEST, Failure, Search, search

MEMORY = Failure("a card failed: no memory", out_of_memory=True)


def rate(batch_size: int, images_per_s: float) -> Rate:
    return Rate(batch_size, (batch_size / images_per_s,))


def searched(measure: Callable[[int], Rate | Failure], largest: int = 256) -> Search:
    first = measure(1)
    assert isinstance(first, Rate)
    return search(first, measure, largest)


def of_table(table: dict[int, float | Failure]) -> Callable[[int], Rate | Failure]:
    """What a card measures that always has these images/s; it fails for any other size."""

    def measure(batch_size: int) -> Rate | Failure:
        value = table[batch_size]
        return value if isinstance(value, Failure) else rate(batch_size, value)

    return measure


@pytest.mark.parametrize(
    ("table", "largest", "chosen", "kind", "text"),
    [
        ({1: 1.0, 2: 1.9, 4: 3.5, 8: MEMORY}, 256, 4, "memory", "the device has no memory for batch size 8"),
        ({1: 1.0, 2: MEMORY}, 256, 1, "memory", "the device has no memory for batch size 2"),
        ({1: 1.0, 2: 1.9, 4: 1.95}, 256, 2, "gain", "batch size 4 brings 2.6% more images/s than 2; less than 5% more"),
        ({1: 1.0, 2: 1.9, 4: 1.5}, 256, 2, "gain", "batch size 4 brings 21.1% fewer images/s than 2"),
        ({1: 1.0, 2: 1.06, 4: 1.14, 8: 1.15}, 256, 4, "gain", "batch size 8 brings 0.9% more"),
        ({1: 1.0, 2: 1.02}, 256, 1, "gain", "batch size 2 brings 2.0% more"),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 4, 4, "largest", "--max-batch-size 4 allows no batch size over it"),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 7, 4, "largest", "--max-batch-size 7 allows"),
        ({1: 1.0}, 1, 1, "largest", "--max-batch-size 1 allows"),
        ({1: 1.0, 2: 1.9, 4: Failure("its process died")}, 256, 2, "failure", "batch size 4 fails: its process died"),
    ],
)
def test_the_search_ends_where_memory_gain_or_the_largest_size_ends(
    table: dict[int, float | Failure], largest: int, chosen: int, kind: str, text: str
) -> None:
    result = searched(of_table(table), largest)
    assert (result.chosen.batch_size, result.stop.kind) == (chosen, kind)
    assert text in result.stop.text


def test_a_size_that_was_disturbed_is_measured_again_and_does_not_end_the_search() -> None:
    asked: list[int] = []

    def measure(batch_size: int) -> Rate:
        asked.append(batch_size)
        disturbed = batch_size == 4 and asked.count(4) == 1
        return rate(batch_size, 0.5 if disturbed else min(batch_size, 8.0))

    result = searched(measure)
    assert asked == [1, 2, 4, 4, 8, 16, 16]
    assert result.chosen.batch_size == 8
    assert result.stop.batch_size == 16


def test_a_second_measurement_that_fails_leaves_the_first() -> None:
    answers: dict[int, list[Rate | Failure]] = {1: [rate(1, 1.0)], 2: [rate(2, 1.01), MEMORY]}
    result = searched(lambda batch_size: answers[batch_size].pop(0))
    assert [each.batch_size for each in result.rates] == [1, 2]
    assert result.stop.kind == "gain"


def test_a_slow_call_among_those_of_a_size_counts_for_nothing() -> None:
    quiet = Rate(4, (1.0, 1.0, 1.0, 1.0, 1.0))
    assert Rate(4, (1.0, 9.0, 1.01, 0.99, 1.0)).images_per_s == quiet.images_per_s


@given(
    st.lists(st.floats(0.01, 1000), min_size=1, max_size=9),
    st.integers(1, 300),
    st.none() | st.integers(1, 8),
)
def test_whatever_is_measured_the_choice_is_small_and_near_the_best(
    images_per_s: list[float], largest: int, memory_ends: int | None
) -> None:
    asked = []

    def measure(batch_size: int) -> Rate | Failure:
        asked.append(batch_size)
        power = batch_size.bit_length() - 1
        if power and (power == memory_ends or power >= len(images_per_s)):
            return MEMORY
        return rate(batch_size, images_per_s[power])

    result = searched(measure, largest)
    sizes = [each.batch_size for each in result.rates]
    assert sizes == [2**power for power in range(len(sizes))]
    assert max(asked) <= max(1, largest)
    assert all(asked.count(size) <= 2 for size in asked)
    enough = (1 - NEAR_BEST) * max(each.images_per_s for each in result.rates)
    assert result.chosen.images_per_s >= enough
    assert all(each.images_per_s < enough for each in result.rates if each.batch_size < result.chosen.batch_size)
    gains = [b.images_per_s / a.images_per_s - 1 for a, b in zip(result.rates, result.rates[1:], strict=False)]
    assert all(gain >= MIN_GAIN for gain in gains[:-1])
    assert (result.stop.kind == "gain") == bool(gains and gains[-1] < MIN_GAIN)
