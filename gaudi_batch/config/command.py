"""The command of a job, from its fields."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from gaudi_batch.config.schema import JobConfig

HIDDEN = "***"
"""What stands in records in place of a secret."""
OF_ONE_COMMAND = ("budget", "deadline", "max_failed", "on_end")
"""Fields that end or follow one command, and have nothing to do with what it makes."""


def run_command(job: Mapping[str, Any], output: str) -> str:
    """The `gaudi-batch run` that makes a job's images, to paste into a shell. Fields with their default are left out,
    and so are those with a secret, which no record has, and `OF_ONE_COMMAND`.

    Args:
        job: the fields, as run.json has them.
        output: where the images are to go.
    """
    fields = {**job, "output": output}
    flags: list[str] = []
    for flag, value in _flags(fields, JobConfig):
        flags += [f"{flag}={value}"] if value.startswith("-") else [flag, value]
    return shlex.join(["gaudi-batch", "run", *flags])


def _has_secret(value: Any) -> bool:
    """Whether a part of a value stands for a secret: all of it, or the user or the query of a URL."""
    if isinstance(value, Mapping):
        return any(map(_has_secret, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_secret, value))
    return value == HIDDEN or (isinstance(value, str) and "://" in value and HIDDEN in value)


def _flags(fields: Mapping[str, Any], model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if name not in fields or name in OF_ONE_COMMAND:
            continue
        value = fields[name]
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if isinstance(value, Mapping):
                yield from _flags(value, kind, f"{prefix}{name}.")
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        text = json.dumps(value)
        if text == json.dumps(default, default=str) or _has_secret(value):
            continue
        yield f"--{prefix}{name}".replace("_", "-"), value if isinstance(value, str) else text
