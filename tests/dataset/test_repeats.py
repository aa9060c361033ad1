"""Rows that share an id are counted, in little memory."""

from __future__ import annotations

from datetime import datetime

import pyarrow as pa
import pytest

from gaudi_batch.dataset.repeats import RepeatedIds


def test_rows_that_share_an_id_are_counted_and_one_is_named() -> None:
    ids = RepeatedIds()
    ids.add(pa.array(["a", "b", None, "c"]))
    assert ids.describe() is None
    ids.add(pa.chunked_array([["d", "b"], [None, "c", "b"]]))
    line = ids.describe() or ""
    assert line.startswith("5 of 7 rows share an id with another row, such as 'b'. Rows of one id get the same seeds;")
    for way_out in ("make the column id unique", "--columns id=NAME", "add a column seed", "have no column id"):
        assert way_out in line


def test_ids_beyond_the_bound_are_not_looked_at_and_that_is_said() -> None:
    ids = RepeatedIds(most=4)
    ids.add(pa.array(["a", "b", "a"]))
    ids.add(pa.array(["c", "c", "c"]))
    assert (ids.describe() or "").startswith(
        "2 of 4 rows share an id with another row, such as 'a'; the first 4 ids were compared. "
    )
    assert ids.seen == 6


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        (pa.array([1, 2, 1]), 2),
        (pa.array([1.5, 1.5, None]), 2),
        (pa.array(["x", "y", "x"]).dictionary_encode(), 2),
        (pa.array([b"\xff", b"\xfe", b"\xff"]), 2),
        (pa.array([datetime(2026, 1, 1), datetime(2026, 1, 2)]), 0),
        (pa.array([{"a": 1}, {"a": 1}, {"a": 2}]), 2),
        (pa.array([[1], [2], [2]]), 2),
        (pa.array([b"\xff", b"\xff"]).view(pa.string()), 2),
        (pa.array([], pa.string()), 0),
    ],
)
def test_ids_of_all_types_are_compared(ids: pa.Array, rows: int) -> None:
    repeated = RepeatedIds()
    repeated.add(ids)
    line = repeated.describe()
    assert (int(line.split(" of ")[0]) if line else 0) == rows


def test_many_ids_take_little_memory_and_an_example_is_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaudi_batch.dataset.repeats._WAITING_IDS", 1000)
    repeated = RepeatedIds()
    for start in range(0, 5000, 100):
        repeated.add(pa.array([str(number % 4999) for number in range(start, start + 100)]))
    assert repeated._sorted.nbytes == 5000 * 8
    assert (repeated.describe() or "").startswith("2 of 5000 rows share an id with another row, such as '0'. ")
