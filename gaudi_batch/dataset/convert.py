"""Makes a Parquet file of prompts from what prompts come as: CSV, TSV, JSON lines, text with a prompt a line, Parquet.

The input is read twice, a line at a time: first for its columns, their types and its bad lines, then to be written. A
line that can't be read, or whose values are not what a job takes, is left out, counted, and told with its number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.config.bounds import MAX_GUIDANCE, MAX_IMAGES, MAX_INT32, MAX_SEED, MAX_STEPS
from gaudi_batch.config.schema import PROMPT_COLUMNS
from gaudi_batch.dataset.csv_tables import TypedText
from gaudi_batch.dataset.lines import BadLine, Line, PromptTable, number_of
from gaudi_batch.errors import InputError
from gaudi_batch.storage.scratch import scratch_directory, scratch_errors
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import counted, did_you_mean, one_line, short_repr

ROW_GROUP_ROWS = 1024
"""Rows of a row group. A card reads whole row groups, and a shard has at most as many images."""
SHOWN = 10
"""Lines that are shown: of those left out, and of rows over several lines."""
TYPES: Mapping[str, pa.DataType] = {
    "prompt": pa.string(),
    "id": pa.string(),
    "negative_prompt": pa.string(),
    "seed": pa.int64(),
    "width": pa.int64(),
    "height": pa.int64(),
    "steps": pa.int64(),
    "guidance_scale": pa.float64(),
    "num_images": pa.int64(),
}
"""Types of the columns that a job knows."""
RANGES = {
    "seed": (0, MAX_SEED),
    "width": (1, MAX_INT32),
    "height": (1, MAX_INT32),
    "steps": (1, MAX_STEPS),
    "guidance_scale": (0, int(MAX_GUIDANCE)),
    "num_images": (1, MAX_IMAGES),
}
"""What a number of a column may be, whatever job reads it."""
_MAX_INT64 = 2**63 - 1
_MAX_EXACT = 2**53
"""Every whole number up to this is a floating-point number, too."""


@dataclass
class Converted:
    """The result of a conversion."""

    unit: str
    """What lines of the input are called."""
    rows: int = 0
    bad: int = 0
    """Lines that were left out."""
    examples: list[str] = field(default_factory=list)
    """The first of them, each with its number and the reason."""
    long: int = 0
    """Rows that go over several lines."""
    long_examples: list[str] = field(default_factory=list)
    """The first of them, each with the numbers of its lines and its prompt."""
    columns: dict[str, str] = field(default_factory=dict)
    """The type of each column."""

    def lines(self) -> list[str]:
        """A few lines for a person."""
        columns = ", ".join(f"{_visible(name)} ({kind})" for name, kind in self.columns.items())
        lines = [f"{counted(self.rows, 'row')} with the columns {one_line(columns, 400)}"]
        if self.bad:
            lines.append(f"left out: {counted(self.bad, self.unit)}, the first of them:")
            lines += [f"  {example}" for example in self.examples]
        if self.long:
            lines.append(
                f"over several lines, unless a quote is not closed: {counted(self.long, 'row')}, the first of them:"
            )
            lines += [f"  {example}" for example in self.long_examples]
        return lines


def convert(table: PromptTable, target: Storage, name: str, columns: Mapping[str, str]) -> Converted:
    """Writes a Parquet file of prompts.

    Args:
        table: the input.
        target: where to.
        name: of the file there.
        columns: names of the input's columns where they are others, as {name: column}.

    Raises:
        InputError: the input has no prompts, or not the named columns.
        StorageError: storage failed.
    """
    names = _names(table, columns)
    known = [column for column, name in names.items() if name in TYPES]
    result = Converted(table.unit)
    kinds: dict[str, Counter[str]] = {}
    for chunk in table.chunks(known):
        for line in chunk.lines:
            try:
                values = _values(line, names)
            except BadLine as bad:
                result.bad += line.span
                if len(result.examples) < SHOWN:
                    result.examples.append(f"{line.place(table.unit)}: {one_line(bad, 200)}")
                continue
            result.rows += 1
            if line.span > 1:
                result.long += 1
                if len(result.long_examples) < SHOWN:
                    prompt = one_line(values["prompt"], 100)
                    result.long_examples.append(f"{line.place(table.unit)} are one row: {prompt}")
            for column, value in values.items():
                kinds.setdefault(column, Counter())[_kind(value)] += 1
    if not result.rows:
        example = f"; the first of {result.bad} bad ones is {result.examples[0]}" if result.bad else ""
        raise InputError(f"{table.name!r} has no row with a prompt{example}")
    schema = pa.schema([(name, TYPES.get(name) or _type(table, name, kinds)) for name in names.values()])
    result.columns = {field.name: one_line(field.type, 100) for field in schema}
    use = "write the prompts"
    with scratch_directory(use) as directory, scratch_errors(use):
        path = f"{directory}/prompts.parquet"
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for rows in _of_size(_good(table, known, names, schema), ROW_GROUP_ROWS):
                writer.write_table(rows)
        target.put_file(name, path)
    return result


def _names(table: PromptTable, columns: Mapping[str, str]) -> dict[str, str]:
    """The name in the result of each column of the input; none if none of its lines can be read. Raises InputError."""
    present = table.columns()
    for name, column in columns.items():
        if name not in PROMPT_COLUMNS:
            raise InputError(
                f"--columns: {name!r} is no column that a job knows; {did_you_mean(name, PROMPT_COLUMNS)}it knows"
                f" {', '.join(PROMPT_COLUMNS)}"
            )
        if present and column not in present:
            raise InputError(f"--columns.{name}: {table.name!r} has no column {column!r}; it has {_listed(present)}")
        if name in present and name != column:
            raise InputError(f"--columns.{name}: {table.name!r} has a column {name!r} of its own, too; rename one")
    if shared := [column for column, count in Counter(columns.values()).items() if count > 1]:
        raise InputError(f"--columns: {shared[0]!r} is named twice; a column of the result comes from one of its own")
    if twice := [column for column, count in Counter(present).items() if count > 1]:
        raise InputError(f"{table.name!r} has the column {twice[0]!r} more than once; rename one")
    if present and "prompt" not in columns and ("prompt" not in present or "prompt" in columns.values()):
        raise InputError(
            f"{table.name!r} has no column 'prompt'; it has {_listed(present)}: name the right one with --columns"
            " prompt=NAME"
        )
    return {column: column for column in present} | {column: name for name, column in columns.items()}


def _visible(name: str) -> str:
    """A column's name as it is, or in quotes if it is empty or one can't see all of it in a line."""
    return name if name and name == one_line(name) else repr(name)


def _listed(names: Sequence[str]) -> str:
    return one_line(", ".join(map(repr, names)), 400)


def _good(table: PromptTable, known: Sequence[str], names: Mapping[str, str], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows that are good."""
    for chunk in table.chunks(known):
        rows: list[dict[str, Any]] = []
        kept: list[int] = []
        for place, line in enumerate(chunk.lines):
            try:
                rows.append(_values(line, names))
            except BadLine:
                continue
            kept.append(place)
        rest = None if chunk.rest is None else chunk.rest.take(pa.array(kept, pa.int64()))
        columns = [
            rest.column(field.name)
            if rest is not None and field.name in rest.column_names
            else pa.array([_fitting(row.get(field.name), field.type) for row in rows], field.type)
            for field in schema
        ]
        yield pa.table(columns, schema=schema)


def _of_size(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    """The rows of tables in tables of one size; the last may be smaller."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while len(rest) >= size:
            yield rest.slice(0, size)
            rest = rest.slice(size)
    if rest is not None and len(rest):
        yield rest


def _values(line: Line, names: Mapping[str, str]) -> dict[str, Any]:
    """The values of a line by the names in the result. Raises BadLine."""
    if line.error is not None:
        raise BadLine(line.error)
    values = {names.get(column, column): value for column, value in line.values.items()}
    for name in filter(values.__contains__, TYPES):
        values[name] = _known(name, values[name])
    if not (values.get("prompt") or "").strip():
        raise BadLine("prompt is empty")
    return values


def _known(name: str, value: Any) -> Any:
    """The value of a column that a job knows, in its type. Raises BadLine."""
    kind = TYPES[name]
    if value is None or (kind != pa.string() and isinstance(value, str) and not value.strip()):
        return None
    if kind == pa.string():
        if isinstance(value, bytes):  # older versions of Spark write texts so
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise BadLine(f"{name} is not UTF-8") from None
        if isinstance(value, str):
            return value
        if name == "id" and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            return str(value)
        raise BadLine(f"{name} is {short_repr(value, 80)}; it must be a text")
    is_whole = kind == pa.int64()
    least, most = RANGES[name]
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
            raise ValueError
        number = number_of(value) if isinstance(value, str) else Decimal(value)
        if not least <= number <= most or (is_whole and number != int(number)):
            raise ValueError
    except (ValueError, ArithmeticError):
        what = f"{'whole number' if is_whole else 'number'} in {least} .. {most}"
        raise BadLine(f"{name} is {short_repr(value, 80)}; it must be a {what}") from None
    return int(number) if is_whole else float(number)


def _kind(value: Any) -> str:
    if isinstance(value, TypedText):
        value = value.value
    if isinstance(value, int) and abs(value) > _MAX_EXACT:
        return "long" if abs(value) <= _MAX_INT64 else "large"
    return "null" if value is None else type(value).__name__


def _type(table: PromptTable, name: str, kinds: Mapping[str, Counter[str]]) -> pa.DataType:
    """The type of a column that a job does not know: its own, or from the kinds of its values; what is nested or mixed
    becomes JSON in a text."""
    if (own := table.type_of(name)) is not None:
        return own
    present = set(kinds.get(name, ())) - {"null"}
    if present == {"bool"}:
        return pa.bool_()
    if present and present <= {"int", "long"}:
        return pa.int64()
    if present and present <= {"int", "float"}:
        return pa.float64()
    return pa.string()


def _fitting(value: Any, kind: pa.DataType) -> Any:
    if isinstance(value, TypedText):
        return str(value) if pa.types.is_string(kind) else value.value
    if pa.types.is_string(kind) and value is not None and not isinstance(value, str):
        return json.dumps(value, default=str)
    return value
