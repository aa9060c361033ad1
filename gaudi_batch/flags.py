"""The flags of a job, made from the fields of `JobConfig`: a field's name with dashes, nested fields dotted."""

from __future__ import annotations

import argparse
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gaudi_batch.config import JobConfig, merge
from gaudi_batch.errors import InputError
from gaudi_batch.text import read_yaml


def add_job_flags(command: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of a job."""
    command.add_argument("job", nargs="?", help="YAML file of the job; flags win over it")
    group = command.add_argument_group("fields of the job")
    for path, field in _fields(JobConfig):
        default = field.get_default(call_default_factory=True)
        shown = "" if field.is_required() or default in (None, {}, ()) else f" (default: {default})"
        group.add_argument(
            f"--{path.replace('_', '-')}",
            dest=f"field:{path}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{field.description}{shown}".replace("%", "%%"),
        )


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """Every field of a job under its dotted name."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", field))
    return found


def job_from(parsed: argparse.Namespace, given: Mapping[str, Any] | None = None) -> JobConfig:
    """The job that the job file and the flags describe. Raises InputError.

    Args:
        parsed: the command line.
        given: fields that neither has to name; they win over the file and lose to flags.
    """
    overrides: dict[str, Any] = dict(given or {})
    fields = dict(_fields(JobConfig))
    for flag, text in vars(parsed).items():
        if flag.startswith("field:"):
            path = flag.removeprefix("field:")
            value: Any = _flag_value(path, text, fields[path])
            overrides = merge(overrides, _nested(path, value))
    return JobConfig.load(parsed.job, overrides)


def _flag_value(path: str, text: str, field: FieldInfo) -> Any:
    """A flag's text as the config takes it: null is null, mappings and lists are YAML, the rest is as it is."""
    kinds = _kinds(field.annotation)
    if type(None) in kinds and text in ("null", "none", ""):
        return None
    flag = f"--{path.replace('_', '-')}"
    if dict in kinds and not (str in kinds and not text.lstrip().startswith("{")):
        return read_yaml(text, dict, flag)
    if tuple in kinds:
        return read_yaml(text, list, flag)
    return text


def _nested(path: str, value: Any) -> dict[str, Any]:
    """`a.b` and 1 as {"a": {"b": 1}}."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _kinds(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    return {typing.get_origin(annotation) or annotation}


def join_mapping_flags(arguments: list[str]) -> list[str]:
    """Turns `--storage-options.anon true`, a flag for one entry, into `--storage-options '{"anon": true}'`."""
    mappings = {
        f"--{path.replace('_', '-')}": path for path, field in _fields(JobConfig) if dict in _kinds(field.annotation)
    }
    fields = dict(_fields(JobConfig))
    also_text = {flag for flag, path in mappings.items() if str in _kinds(fields[path].annotation)}
    joined: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        name, dot, key = flag.partition(".")
        if name in mappings and dot:
            if not equals:
                if not waiting:
                    raise InputError(f"{flag} needs a value")
                value = waiting.pop(0)
            # Names of columns and secrets are text, whatever YAML would make of them.
            entry: Any = {"true": True, "false": False}.get(value, value) if name != "--columns" else value
            joined[name] = merge(joined.get(name, {}), _nested(key, entry))
        elif name in mappings:
            if not equals:
                value = waiting.pop(0) if waiting else ""
            if name in also_text and not value.lstrip().startswith("{"):
                rest += [name, value]
                continue
            joined[name] = merge(joined.get(name, {}), read_yaml(value, dict, flag))
        else:
            rest.append(argument)
    for name, mapping in joined.items():
        rest += [name, json.dumps(mapping)]
    return rest
