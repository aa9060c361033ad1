"""Changes one field in the text of a job file and leaves everything else as it is, comments and layout included."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import yaml

from gaudi_batch.text import load_yaml


def with_field(text: str, name: str, value: int) -> str:
    """The text of a job file with another value of one field.

    The value in place is replaced. A field that is missing is put into a line of its own at the end; where that line
    would be a part of what is above it, at the beginning.

    Args:
        text: YAML whose top level is a mapping.
        name: the field, one of the top level.
        value: its new value.

    Raises:
        ValueError: the text can't be changed so that it means the same with the new value.
    """
    before = load_yaml(text)
    if not isinstance(before, dict):
        raise ValueError("it is no mapping of fields")
    if name in before and type(before[name]) is int and before[name] == value:
        return text
    for edited in _edits(text, name, value):
        with contextlib.suppress(yaml.YAMLError, ValueError):
            # That nothing else has changed is read from the result: YAML has more forms than those that are known here.
            if load_yaml(edited) == {**before, name: value}:
                return edited
    raise ValueError(f"{name} has no line of its own that could be changed")


def _edits(text: str, name: str, value: int) -> Iterator[str]:
    """What may be the text with the new value."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return
    for key, old in reversed(root.value):  # of two with one name the last counts
        if isinstance(key, yaml.ScalarNode) and key.value == name:
            start, stop = old.start_mark.index, old.end_mark.index
            space = " " if start == stop else ""  # it has no value
            yield f"{text[:start]}{space}{value}{text[stop:]}"
            return
    start = root.start_mark.index
    if root.flow_style:
        comma = ", " if root.value else ""
        yield f'{text[: start + 1]}"{name}": {value}{comma}{text[start + 1 :]}'
        return
    newline = "\r\n" if "\r\n" in text else "\n"
    indent = " " * root.start_mark.column
    ended = text if text.endswith("\n") else text + newline
    yield f"{ended}{indent}{name}: {value}{newline}"
    yield f"{text[:start]}{name}: {value}{newline}{indent}{text[start:]}"
