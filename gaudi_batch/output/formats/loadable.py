"""What describes images in types and texts that all loaders read."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from gaudi_batch.dataset.arrow import is_text
from gaudi_batch.dataset.columns import cast, plain


def loadable(table: pa.Table, *, microseconds: bool = False) -> pa.Table:
    """A table in plain types, without maps, which `datasets` knows no type for, and with texts that are UTF-8, without
    which most libraries refuse a whole file. A map becomes a list of its keys and values; what is not UTF-8 in a text
    becomes U+FFFD. All other values stay as they are.

    Args:
        table: the table.
        microseconds: whether times have these, as Python has, and not nanoseconds.
    """
    schema = plain(table.schema.remove_metadata())
    columns = [
        _mended(cast(column, kind), microseconds) for column, kind in zip(table.columns, schema.types, strict=True)
    ]
    return pa.table(columns, names=schema.names)


def _mended(column: pa.ChunkedArray, microseconds: bool) -> pa.ChunkedArray:
    is_fine = microseconds and _has(column.type, _is_fine)
    if not is_fine and not _has(column.type, pa.types.is_map) and _is_valid(column):
        return column
    chunks = [_mend(chunk, microseconds) for chunk in column.chunks]
    return pa.chunked_array(chunks or [_mend(pa.array([], column.type), microseconds)])


def _is_valid(column: pa.ChunkedArray) -> bool:
    """Whether all texts in it are UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _has(kind: pa.DataType, is_wanted: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type is one, or has one nested in it."""
    if is_wanted(kind):
        return True
    if pa.types.is_struct(kind):
        return any(_has(field.type, is_wanted) for field in kind)
    if pa.types.is_map(kind):
        return _has(kind.key_type, is_wanted) or _has(kind.item_type, is_wanted)
    return _is_list(kind) and _has(kind.value_type, is_wanted)


def _is_fine(kind: pa.DataType) -> bool:
    """Whether it has nanoseconds."""
    return pa.types.is_temporal(kind) and getattr(kind, "unit", "") == "ns"


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _mend(array: pa.Array, microseconds: bool) -> pa.Array:
    kind = array.type
    if is_text(kind):
        binary = pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
        texts = [
            None if value is None else value.decode("utf-8", "replace") for value in array.view(binary).to_pylist()
        ]
        return pa.array(texts, kind)
    if microseconds and _is_fine(kind):
        coarse = pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")
        return array.cast(pa.timestamp("us", kind.tz) if pa.types.is_timestamp(kind) else coarse, safe=False)
    if pa.types.is_struct(kind):
        children = [_mend(child, microseconds) for child in array.flatten()]
        fields = [field.with_type(child.type) for field, child in zip(kind, children, strict=True)]
        return pa.StructArray.from_arrays(children, fields=fields, mask=array.is_null())
    if pa.types.is_fixed_size_list(kind):
        lists = _mend(array.cast(pa.list_(kind.value_type)), microseconds)
        return lists.cast(pa.list_(lists.type.value_type, kind.list_size))
    if pa.types.is_map(kind) or _is_list(kind):
        whole = array.take(pa.array(range(len(array)), pa.int64()))  # without an offset, which a mask does not go with
        if pa.types.is_map(kind):
            children = [_mend(whole.keys, microseconds), _mend(whole.items, microseconds)]
            values = pa.StructArray.from_arrays(children, names=["key", "value"])
        else:
            values = _mend(whole.values, microseconds)
        lists = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
        return lists.from_arrays(whole.offsets, values, mask=whole.is_null())
    return array
