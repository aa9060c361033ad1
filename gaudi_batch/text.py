"""Numbers and foreign text as a person reads them."""

from __future__ import annotations

from typing import Any

import yaml

from gaudi_batch.errors import InputError


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def printable(text: str) -> str:
    """Text from elsewhere with nothing in it that could steer a terminal or forge a line."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)


def name(text: str) -> str:
    """A foreign name within a line: as it is, or quoted if something in it is not printable."""
    return text if text.isprintable() else repr(text)


def read_yaml(text: str, kind: type, flag: str) -> Any:
    """The value of a flag that takes a YAML mapping or list. Raises InputError, which does not show the value."""
    try:
        value = yaml.safe_load(text) if text else kind()
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        example = "'{key: value}'" if kind is dict else "'[1, 2]'"
        raise InputError(f"{flag}: its value must be YAML such as {example}")
    return value
