"""What describes images in types and texts that all loaders read."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from gaudi_batch.dataset.arrow import python_rows
from gaudi_batch.dataset.columns import cast, plain


def loadable(table: pa.Table) -> pa.Table:
    """A table in plain types, without maps, which `datasets` knows no type for, and with texts that are UTF-8, without
    which most libraries refuse a whole file. A map becomes a list of its keys and values."""
    schema = plain(table.schema.remove_metadata())
    columns = []
    for column, name, kind in zip(table.columns, schema.names, schema.types, strict=True):
        values, without_maps = cast(column, kind), _without_maps(kind)
        if without_maps != kind or not _is_utf8(values):
            rows = python_rows(pa.table([values], names=["value"]))
            values = pa.chunked_array([pa.array([_fitting(row["value"], without_maps) for row in rows], without_maps)])
        columns.append((name, values))
    return pa.table([values for _, values in columns], names=[name for name, _ in columns])


def _is_utf8(column: pa.ChunkedArray) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _without_maps(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_map(kind):
        return pa.list_(pa.struct([("key", _without_maps(kind.key_type)), ("value", _without_maps(kind.item_type))]))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_maps(field.type)) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_without_maps(kind.value_type)), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_maps(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_maps(kind.value_type)))
    return kind


def _fitting(value: Any, kind: pa.DataType) -> Any:
    """A Python value in the type without maps."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        pairs = zip(names, value, strict=True) if isinstance(value, tuple) else ((name, value[name]) for name in names)
        return {name: _fitting(item, kind.field(name).type) for name, item in pairs}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_fitting(item, kind.value_type) for item in value] if isinstance(value, list) else None
    return str(value) if isinstance(value, str) else value
