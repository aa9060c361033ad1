"""Numbers and foreign text in the form that a person reads."""

from __future__ import annotations

import contextlib
import difflib
import logging
import reprlib
from collections.abc import Iterable
from typing import Any

import yaml

from gaudi_batch.errors import InputError
from gaudi_batch.redaction import redact

MAX_YAML_VALUES = 100_000
"""A job has some dozens of values; nested aliases can make billions of a few lines."""


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number of things, as `1 shard` or `2 shards`; the plural is the noun with an s if none is given."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"


def printable(text: str) -> str:
    """Foreign text without anything that could steer a terminal, turn the line around or forge another."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def one_line(text: object, most: int = 500) -> str:
    """Foreign text as a part of one line: white space as single spaces, the rest printable, at most so long."""
    return printable(" ".join(str(text)[: 4 * most].split()))[:most]


def short_repr(value: object, most: int = 200) -> str:
    """A foreign value for a message, however large or deep it is: printable and at most so long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    with contextlib.suppress(ValueError):  # an integer of more digits than Python writes out
        return one_line(short.repr(value), most)
    return f"a {type(value).__name__} that is too large to show"


class OneLineFormatter(logging.Formatter):
    """Log lines whose message is one line, printable and without secrets, whatever foreign text is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return redact(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        record.message = printable(record.message)
        return super().formatMessage(record)


def quote_if_unprintable(text: str) -> str:
    """A foreign name within a line, quoted if something in it is not printable."""
    return text if text.isprintable() else repr(text)


def short_hosts(hosts: Iterable[str]) -> dict[str, str]:
    """Names of hosts without the domain that all of them share: a.example.com and b.example.com are a and b."""
    names = sorted({host for host in hosts if host and not host.replace(".", "").isdecimal()})
    parts = [name.split(".") for name in names]
    common = 0
    while (
        len(names) > 1
        and all(len(each) > common + 1 for each in parts)
        and len({each[-1 - common] for each in parts}) == 1
    ):
        common += 1
    return {name: ".".join(each[: len(each) - common]) for name, each in zip(names, parts, strict=True)}


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, or None; case, dashes and underscores make no difference."""
    plain = {each.lower().replace("_", "-"): each for each in known}
    matches = difflib.get_close_matches(given[:100].lower().replace("_", "-"), plain, 1, 0.7)
    return plain[matches[0]] if matches else None


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? ` if a known name is near, else nothing."""
    near = nearest(given, known)
    return f"did you mean {near!r}? " if near else ""


def load_yaml(text: str) -> Any:
    """Reads a YAML text into plain Python values.

    Raises:
        yaml.YAMLError: it is not YAML, or names a Python object.
        ValueError: it has a value that can't be, or its aliases make more of it than `MAX_YAML_VALUES`.
        RecursionError: it is nested too deeply.
    """
    value = yaml.safe_load(text)
    remaining, count = [value], 0
    while remaining:
        part = remaining.pop()
        count += 1
        if count + len(remaining) > MAX_YAML_VALUES:
            raise ValueError("aliases make too many values")
        if isinstance(part, dict):
            remaining += [*part, *part.values()]
        elif isinstance(part, (list, tuple, set)):
            remaining += part
    return value


def read_yaml(text: str, kind: type, flag: str) -> Any:
    """The value of a flag that takes a YAML mapping or list. Raises InputError, which does not show the value."""
    try:
        value = load_yaml(text) if text else kind()
    except (yaml.YAMLError, ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        example = "'{key: value}'" if kind is dict else "'[1, 2]'"
        raise InputError(f"{flag}: its value must be YAML such as {example}")
    return value


def describe_error(error: BaseException) -> str:
    """An exception in one printable line of at most 500 characters."""
    return one_line(redact(f"{type(error).__name__}: {error}"))
