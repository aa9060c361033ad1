"""Writes the tables of docs/job-file.md from the fields of a job.

    python tools/job_file.py

They say of each field what its declaration does: its type, its bounds, its default and its docstring.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gaudi_batch.cli.flags import docstrings
from gaudi_batch.config.schema import JobConfig

PAGE = Path(__file__).resolve().parent.parent / "docs/job-file.md"
BEGIN, END = "<!-- begin fields -->", "<!-- end fields -->"
_NAMES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`"}
_HEAD = "| field | value | default | meaning |\n| --- | --- | --- | --- |"


def page(text: str) -> str:
    """The page with the tables of the fields as they are now between its marks."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def tables() -> str:
    """A table of the fields of a job, and one for each field that has fields of its own."""
    parts = [_table(JobConfig)]
    for name, section in _sections(JobConfig):
        meaning = " ".join((section.__doc__ or "").split())
        parts.append(f"### `{name}`\n\n{meaning}\n\n{_table(section, name)}")
    return "\n\n".join(parts)


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The fields that have fields of their own, with their dotted names."""
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield f"{prefix}{name}", kind
                yield from _sections(kind, f"{prefix}{name}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in typing.get_args(annotation):
        yield from _kinds(inner)


def _table(model: type[BaseModel], of: str = "") -> str:
    described = docstrings(model)
    lines = [_HEAD]
    for name, field in model.model_fields.items():
        full = f"{of}.{name}" if of else name
        cells = (f"`{full}`", _value(field.annotation, field.metadata, full), _default(field, full), described[name])
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _value(annotation: Any, rules: list[Any], name: str) -> str:
    """What a field may be, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _value(inner[0], [rule for info in inner[1:] for rule in _rules(info)], name)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_value(part, rules, name) for part in inner)
    if origin in (list, tuple):
        return f"list of: {_value(inner[0], [], name)}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        short = getattr(annotation, "short_for", None)
        return f"[mapping](#{_anchor(name)})" + (f", or its `{short}` alone" if short else "")
    kind = _NAMES.get(annotation) or annotation.__name__
    return kind if annotation is type(None) else kind + _bounds(rules)


def _rules(info: Any) -> list[Any]:
    return info.metadata if isinstance(info, FieldInfo) else [info]


def _bounds(rules: list[Any]) -> str:
    least = [rule.ge for rule in rules if isinstance(rule, Ge)]
    over = [rule.gt for rule in rules if isinstance(rule, Gt)]
    most = [rule.le for rule in rules if isinstance(rule, Le)]
    if least and most:
        return f" ({least[0]} to {most[0]:,})"
    return f" ({least[0]} or more)" if least else f" (over {over[0]})" if over else ""


def _default(field: FieldInfo, name: str) -> str:
    if field.is_required():
        return "none: it must be named"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return f"[its own](#{_anchor(name)})"
    if isinstance(default, dict | list | tuple):
        return f"`{json.dumps(default)}`"
    return f"`{json.dumps(default) if isinstance(default, bool) or default is None else default}`"


def _anchor(name: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w-]", "", name)


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
