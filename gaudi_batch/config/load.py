"""Reads the fields of a job, merges them, and explains errors in them."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from gaudi_batch.errors import InputError
from gaudi_batch.text import load_yaml, nearest, quote_if_unprintable, short_repr

MAX_JOB_FILE = 1 << 20
"""Bytes of a job file; a larger one is something else."""


def read_job_file(path: str | Path) -> dict[str, Any]:
    """The fields of a job file as its YAML has them.

    Raises:
        InputError: it can't be read, or is no mapping.
    """
    try:
        loaded = load_yaml(_read_text(path))
    except (OSError, UnicodeEncodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"job file {str(path)!r} can't be read: {reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        # The error's own text quotes the file, which may hold a secret.
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"job file {str(path)!r} is not YAML{where}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"job file {str(path)!r} must hold a mapping of fields, such as 'seed: 0'")
    return loaded


def _read_text(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        data = file.read(MAX_JOB_FILE + 1)
    if len(data) > MAX_JOB_FILE:
        raise ValueError("too large")
    return data.decode()


def in_full(fields: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a job with mappings in place of short forms, so that they can be merged.

    Args:
        fields: by name.
        model: declares the fields of a job.
    """
    full = dict(fields)
    if isinstance(full.get("columns"), str) and (columns := pairs(full["columns"])) is not None:
        full["columns"] = columns
    for path, section in _sections(model).items():
        if isinstance(full.get(path), str) and hasattr(section, "short_for"):
            full[path] = {section.short_for: full[path]}
    return full


def _sections(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a job that have fields themselves."""
    kinds = {path: field.annotation for path, field in model.model_fields.items()}
    return {path: kind for path, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


_PAIR = re.compile(r"\s*[\w.-]+\s*=")
_PAIR_ENDS = re.compile(rf",(?={_PAIR.pattern})")


def pairs(text: str, several: bool = True) -> dict[str, str] | None:
    """`prompt=caption,id=key` as a mapping; None if the text is something else.

    Args:
        text: what was given.
        several: whether a comma ends a pair where a name and = follow it; a secret may have such a comma.
    """
    parts = _PAIR_ENDS.split(text) if several else [text]
    if not all(_PAIR.match(part) for part in parts):
        return None
    return {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings; where both hold a value, `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def _section_at(model: type[BaseModel], where: Iterable[str]) -> type[BaseModel]:
    """The part of a job that has fields of its own at a place in it; also one of several in a list, or one that may be
    null."""
    for part in where:
        if not part.isdecimal():
            model = next(_sections_in(model.model_fields[part].annotation))
    return model


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections_in(inner)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for all that is wrong with a job: each field, its value and its rule. Values of storage options and of
    on_end, which may be secrets, are not shown.

    Args:
        error: what the validation found.
        model: declares the fields of a job.
    """
    lines: dict[str, str] = {}
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if not str(part).startswith(("constrained-", "literal["))]
        where = [part for part in where if part not in ("int", "float", "str", "dict")]
        if problem["type"] == "extra_forbidden":
            where = [str(part) for part in problem["loc"]]  # a name that the user chose may be one of these
        field = quote_if_unprintable(".".join(where))[:200] or "job"
        if problem["type"] == "extra_forbidden":
            message = "is not a field of a job"
            above = [str(part) for part in problem["loc"][:-1]]
            near = nearest(where[-1], _section_at(model, above).model_fields)
            message += f"; did you mean {'.'.join([*above, near])}?" if near else ""
        elif problem["type"] == "missing":
            message = "is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "model_type" and where:
                message = f"must be a mapping of {', '.join(_section_at(model, where).model_fields)}"
            message = message[0].lower() + message[1:]
            if not where:
                lines.setdefault(message.split(":")[0], message)
                continue
            if "storage_options" not in field and where[0] != "on_end":
                message = f"{short_repr(problem['input'])}: {message}"
        lines[field] = (
            f"{field}: {message}" if field not in lines else f"{lines[field]}, or {message.split(': ', 1)[-1]}"
        )
    return "; ".join(lines.values())
