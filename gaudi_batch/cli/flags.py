"""The flags of a job, made from the fields of `JobConfig`: a field's name with dashes, nested fields dotted."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gaudi_batch.config.load import merge, pairs
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError
from gaudi_batch.text import read_yaml


def add_job_flags(command: argparse.ArgumentParser) -> None:
    """Adds a flag for every field of a job."""
    command.add_argument(
        "job",
        nargs="?",
        help="YAML file of the job; flags win over it, and its paths are relative to the working directory, as theirs",
    )
    group = command.add_argument_group("fields of the job")
    for path, field in _fields(JobConfig):
        default = field.get_default(call_default_factory=True)
        default = str(default).lower() if isinstance(default, bool) else default
        visible = "" if field.is_required() or default in (None, {}, ()) else f" (default: {default})"
        flag = f"--{path.replace('_', '-')}"
        if path in _short_forms():
            visible, description = "", f"Short for --{_short_forms()[path]}."
        else:
            description = field.description or ""
        group.add_argument(
            flag,
            dest=f"field:{path}",
            metavar=_metavar(field.annotation),
            default=argparse.SUPPRESS,
            help=f"{description}{visible}".replace("%", "%%"),
        )
        if _kinds(field.annotation) <= {dict, type(None)}:
            # Never parsed: `join_mapping_flags` has taken them.
            group.add_argument(
                f"{flag}.NAME",
                dest=f"entry:{path}",
                metavar="VALUE",
                default=argparse.SUPPRESS,
                help="One entry of it.",
            )


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """Every field of a job with its dotted name, and with what the docstring below it says."""
    fields: list[tuple[str, FieldInfo]] = []
    described = docstrings(model)
    for name, field in model.model_fields.items():
        field.description = described.get(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if short := getattr(field.annotation, "short_for", None):
                fields.append((f"{prefix}{name}", field.annotation.model_fields[short]))
            fields += _fields(field.annotation, f"{prefix}{name}.")
        else:
            fields.append((f"{prefix}{name}", field))
    return fields


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """What stands below the fields of a class in its source."""
    module = ast.parse(Path(inspect.getfile(model)).read_text(encoding="utf-8"))
    (source,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == model.__name__)
    docstrings = {}
    for field, below in itertools.pairwise(source.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docstrings[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return docstrings


def _short_forms() -> dict[str, str]:
    """Flags of sections that stand for one of their fields: {section: path of the field}."""
    sections = {name: field.annotation for name, field in JobConfig.model_fields.items()}
    shorts = {name: getattr(kind, "short_for", None) for name, kind in sections.items()}
    return {name: f"{name}.{short}" for name, short in shorts.items() if short}


def _metavar(annotation: Any) -> str:
    """The placeholder for a flag's value in the help: the possible values if they can be listed."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is Literal:
        return f"{{{','.join(map(str, typing.get_args(annotation)))}}}"
    if annotation is bool:
        return "{true,false}"
    if annotation in (int, float):
        return "NUMBER"
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [part for part in typing.get_args(annotation) if part is not type(None)]
        parts = list(dict.fromkeys(_metavar(part).strip("{}") for part in kinds))
        listed = any(typing.get_origin(part) is Literal or part is bool for part in kinds)
        parts += ["null"] if listed and len(kinds) < len(typing.get_args(annotation)) else []
        return "VALUE" if "VALUE" in parts else parts[0] if len(parts) == 1 else f"{{{','.join(parts)}}}"
    return "VALUE"


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
            if text.lstrip().startswith("{") and (path in _short_forms() or _is_section(fields[path])):
                value: Any = read_yaml(text, dict, f"--{path}")
            else:
                value = _flag_value(path, text, fields[path])
                path = _short_forms().get(path, path)
            overrides = merge(overrides, _nested(path, value))
    return JobConfig.load(parsed.job, overrides)


def _flag_value(path: str, text: str, field: FieldInfo) -> Any:
    """The value of a flag for the config: null is null, mappings and lists are YAML, anything else is text."""
    kinds = _kinds(field.annotation)
    if type(None) in kinds and text in ("null", "none", ""):
        return None
    flag = f"--{path.replace('_', '-')}"
    if dict in kinds and not (str in kinds and not text.lstrip().startswith("{")):
        return read_yaml(text, dict, flag)
    if tuple in kinds and not (_takes_text(field.annotation) and not text.lstrip().startswith(("[", "{"))):
        return read_yaml(text if text.lstrip().startswith("[") else f"[{text}]", list, flag)
    return text


def _takes_text(annotation: Any) -> bool:
    """Whether each of the sections in a list may be a text, which then has commas and colons of its own."""
    return any(getattr(item, "takes_text", False) for item in typing.get_args(annotation))


def _is_section(field: FieldInfo) -> bool:
    """Whether the value of a field is a section, or null."""
    return any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in _kinds(field.annotation))


def _nested(path: str, value: Any) -> dict[str, Any]:
    """`a.b` and 1 become {"a": {"b": 1}}."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def _kinds(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    return {typing.get_origin(annotation) or annotation}


def _entry(flag: str, key: str, value: str) -> dict[str, Any]:
    """One entry of a mapping. Names of columns and secrets are text, whatever YAML would make of them."""
    return _nested(key, value if flag == "--columns" else {"true": True, "false": False}.get(value, value))


def join_mapping_flags(arguments: list[str]) -> list[str]:
    """Turns `--storage-options.anon true` and `--storage-options anon=true`, which are for one entry, into
    `--storage-options '{"anon": true}'`."""
    mappings = {
        f"--{path.replace('_', '-')}": path for path, field in _fields(JobConfig) if dict in _kinds(field.annotation)
    }
    fields = dict(_fields(JobConfig))
    also_text = {flag for flag, path in mappings.items() if str in _kinds(fields[path].annotation)}
    mappings["--target-options"] = "target_options"  # of `export`, which is no job
    joined: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        name, dot, key = flag.partition(".")
        if name in mappings and dot:
            if not equals:
                if not remaining:
                    raise InputError(f"{flag} needs a value")
                value = remaining.pop(0)
            joined[name] = merge(joined.get(name, {}), _entry(name, key, value))
        elif name in mappings:
            if not equals:
                value = remaining.pop(0) if remaining else ""
            if name in also_text and not value.lstrip().startswith("{"):
                rest += [name, value]
                continue
            # A value, also a secret one, may contain commas; pairs of columns are separated by theirs.
            entries = pairs(value, several=name == "--columns")
            if entries is None:
                joined[name] = merge(joined.get(name, {}), read_yaml(value, dict, flag))
            for key, text in (entries or {}).items():
                joined[name] = merge(joined.get(name, {}), _entry(name, key, text))
        else:
            rest.append(argument)
    for name, mapping in joined.items():
        rest += [name, json.dumps(mapping)]
    return rest
