"""Failed rows by reason: few lines that say what is wrong with many rows."""

from __future__ import annotations

from gaudi_batch.dataset.reasons import (
    FIRST_IDS,
    MAX_ID_SHOWN,
    MAX_REASON_SHOWN,
    MAX_REASONS,
    OTHERS,
    Reasons,
    reason_lines,
)


def test_errors_that_differ_in_their_values_alone_are_one_reason() -> None:
    reasons = Reasons()
    for number in range(7):
        reasons.add(f"width {100_000 + number} is too large; at most 8,192", f"row-{number}")
    reasons.add("the prompt can't be 'empty'", "a")
    reasons.add("the prompt can't be 'a 2nd: \"value\"'", "b")
    reasons.add("guidance_scale is -1.5e3", "c")
    assert reasons.describe() == [
        {
            "reason": "width 100000 is too large; at most 8,192 (others differ in the values)",
            "rows": 7,
            "first_ids": [f"row-{number}" for number in range(FIRST_IDS)],
        },
        {
            "reason": "the prompt can't be 'empty' (others differ in the values)",
            "rows": 2,
            "first_ids": ["a", "b"],
        },
        {"reason": "guidance_scale is -1.5e3", "rows": 1, "first_ids": ["c"]},
    ]
    assert reason_lines(reasons.describe())[1:] == [
        "2 rows: the prompt can't be 'empty' (others differ in the values) (id a, b)",
        "1 row: guidance_scale is -1.5e3 (id c)",
    ]


def test_memory_is_bounded_and_no_row_is_lost() -> None:
    reasons = Reasons()
    for number in range(1000):
        reasons.add("word" * (number + 1), f"{number}" * 100)
    described = reasons.describe()
    assert len(described) == MAX_REASONS + 1
    assert sum(group["rows"] for group in described) == 1000
    assert described[-1]["reason"] == OTHERS
    assert max(len(group["reason"]) for group in described) <= MAX_REASON_SHOWN
    assert max(len(row_id) for group in described for row_id in group["first_ids"]) <= MAX_ID_SHOWN


def test_ids_and_errors_can_not_steer_a_terminal_or_forge_a_line() -> None:
    reasons = Reasons()
    reasons.add("boom\x1b[2J\nrun: complete", "a\nb\x1b\u202e")
    (line,) = reason_lines(reasons.describe())
    assert line.isprintable()
    assert "boom" in line
