"""Types of the columns that a job carries from the prompts into the manifests."""

from __future__ import annotations

import pyarrow as pa


def plain(schema: pa.Schema) -> pa.Schema:
    """A schema in types that hold the same values in any number of files and rows.

    A dictionary becomes the type of its values: its codes are numbered anew in each file, and all files together can
    have more values than the codes have numbers. A view becomes the type that it is a view of, as Arrow can't select
    rows of all views. Nulls are possible everywhere, as a file may not have the column and a row group may not be
    readable.
    """
    return pa.schema([_plain_field(field) for field in schema])


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain_type(field.type)).with_nullable(True)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    plain = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    if kind in plain:
        return plain[kind]
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_field(kind.item_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    return kind


def cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Casts a column to a type that others share. Digits that a floating-point number can't hold are lost; any other
    value that the type can't hold, such as the year 9999 in nanoseconds, becomes null."""
    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        if _is_floating(kind):
            return column.cast(kind, safe=False)
        values = [_cast_value(column.slice(place, 1), kind) for place in range(len(column))]
        return pa.chunked_array(values, kind)


def can_cast(given: pa.DataType, kind: pa.DataType) -> bool:
    """Whether a column of one type can be cast to another, whatever its values are."""
    try:
        pa.nulls(1, given).cast(kind)
    except pa.ArrowException:
        return False
    return True


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column has binary values, itself or nested in it."""
    if pa.types.is_nested(kind):
        return any(is_binary(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _cast_value(value: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    try:
        return value.cast(kind).combine_chunks()
    except pa.ArrowInvalid:
        return pa.nulls(1, kind)


def _is_floating(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_floating(kind))
