"""Values of Arrow tables as Python has them, whatever types their columns are of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gaudi_batch.dataset.columns import plain
from gaudi_batch.dataset.rows import Undecodable


def python_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table as Python values; one that Python can't hold comes as `Undecodable`."""
    try:
        return table.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError):  # UnicodeDecodeError among them
        columns = {name: [_value(item) for item in table.column(name)] for name in table.column_names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def distinct_rows(table: pa.Table, rows: int) -> tuple[npt.NDArray[np.int64], list[dict[str, Any]]]:
    """The distinct rows of a table with few columns, so that Python looks at each of them once: for each row of the
    table its place among the distinct rows, and these as Python values.

    A column's values are numbered and the numbers of all columns combined.

    Args:
        table: of columns that decide a shape.
        rows: how many it has; a table without columns does not know.
    """
    codes = np.zeros(rows, dtype=np.int64)
    for column in table.columns if rows else ():
        encoded = _plain_values(column).dictionary_encode(null_encoding="encode")
        codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy(zero_copy_only=False)
        codes = np.unique(codes, return_inverse=True)[1]
    firsts = np.unique(codes, return_index=True)[1]
    return codes, rows_at(table, firsts) if table.num_columns else [{}] * len(firsts)


def rows_at(table: pa.Table, places: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Some rows of a table as Python values; a value that Python can't hold comes as `Undecodable`."""
    try:
        return python_rows(table.cast(plain(table.schema)).take(pa.array(places)))
    except pa.ArrowException:  # not every value of a type can be cast
        return [{name: _value(table.column(name)[place]) for name in table.column_names} for place in places.tolist()]


def take(table: pa.Table, places: npt.NDArray[np.int64]) -> pa.Table:
    """Some rows of a table. A view, from which Arrow may not be able to take, is cast to its plain type."""
    if np.array_equal(places, np.arange(len(table))):
        return table
    kinds = plain(table.schema).types
    columns = [
        (column if pa.types.is_dictionary(column.type) else column.cast(kind)).take(pa.array(places))
        for column, kind in zip(table.columns, kinds, strict=True)
    ]
    return pa.table(columns, names=table.column_names)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of a type are texts, also through a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _plain_values(column: pa.ChunkedArray) -> pa.Array:
    """A shape column cast to a type whose values Arrow can number."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or is_text(kind):
        plain = pa.string() if is_text(kind) else kind
        return column.cast(plain).combine_chunks()
    return pa.array([_text(item) if item.is_valid else None for item in column], pa.string())


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        raw = item.value if isinstance(item, pa.DictionaryScalar) else item
        if not hasattr(raw, "as_buffer"):  # a text within it is to blame
            return Undecodable(_text(item))
        return Undecodable(bytes(raw.as_buffer()).decode("utf-8", "replace"))
    except (ValueError, OverflowError):
        return Undecodable(_text(item))


def _text(item: pa.Scalar) -> str:
    try:
        return str(item.cast(pa.string()).as_py())
    except (pa.ArrowException, ValueError, OverflowError):
        return f"a {item.type} that can't be shown"
