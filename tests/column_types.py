"""Columns of every type that prompts may carry."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa

ROWS = 100
"""Of a file. Two files have more values than an int8 has numbers."""


def categories(file: int) -> pa.Array:
    """A column as pandas writes its categories: a dictionary whose codes are int8."""
    return pa.DictionaryArray.from_arrays(
        pa.array(range(ROWS), pa.int8()), pa.array([f"category {file}-{number}" for number in range(ROWS)])
    )


def every(step: int) -> pa.Array:
    return pa.array(range(0, ROWS + step, step), pa.int32())


def extension(kind: pa.DataType, values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


ALIKE: dict[str, Callable[[int], pa.Array]] = {
    "dictionary": categories,
    "dictionary_in_struct": lambda file: pa.StructArray.from_arrays([categories(file)], ["inner"]),
    "dictionary_in_list": lambda file: pa.ListArray.from_arrays(every(1), categories(file)),
    "dictionary_in_map": lambda file: pa.MapArray.from_arrays(every(1), pa.array(["key"] * ROWS), categories(file)),
    "null": lambda file: pa.nulls(ROWS),
    "decimal256": lambda file: pa.array([Decimal(f"{10**40 + number}.25") for number in range(ROWS)]),
    "half": lambda file: pa.array([0.5] * ROWS, pa.float16()),
    "uint64": lambda file: pa.array([2**64 - 1] * ROWS, pa.uint64()),
    "date": lambda file: pa.array([datetime.date(2026, 1, 1)] * ROWS),
    "time": lambda file: pa.array([datetime.time(1, 2, 3)] * ROWS),
    "duration": lambda file: pa.array([datetime.timedelta(seconds=1)] * ROWS),
    "zoned": lambda file: pa.array([1] * ROWS, pa.timestamp("us", tz="Europe/Berlin")),
    "text_views": lambda file: pa.array([["a", None]] * ROWS, pa.list_(pa.string_view())),
    "bytes": lambda file: pa.array([b"\xff\x00"] * ROWS, pa.binary(2)),
    "large": lambda file: pa.array([["a"]] * ROWS, pa.large_list(pa.large_string())),
    "list_view": lambda file: pa.array([[1, 2]] * ROWS, pa.list_view(pa.int8())),
    "fixed_list": lambda file: pa.array([[1, 2]] * ROWS, pa.list_(pa.int8(), 2)),
    "required": lambda file: pa.array([{"a": 1}] * ROWS, pa.struct([pa.field("a", pa.int8(), nullable=False)])),
    "uuid": lambda file: extension(pa.uuid(), [bytes([number] * 16) for number in range(ROWS)]),
    "tensor": lambda file: extension(pa.fixed_shape_tensor(pa.float32(), [2]), [[1, 2]] * ROWS),
}
"""Columns that are of one type in both files."""


def values(table: pa.Table) -> dict[str, list[Any]]:
    return {
        name: [str(item.value if isinstance(item, pa.ExtensionScalar) else item.as_py()) for item in table.column(name)]
        for name in table.column_names
    }
