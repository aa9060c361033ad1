"""What the doctor says, for a person and for a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gaudi_batch.doctor.line import Line
from gaudi_batch.text import counted

WORDS = {"ok": "ok", "note": "note", "bad": "BAD"}


def could_run(nodes: Mapping[str, Sequence[Line]]) -> bool:
    """Whether a job could run on all nodes."""
    return not any(line.verdict == "bad" for lines in nodes.values() for line in lines)


def describe(nodes: Mapping[str, Sequence[Line]]) -> dict[str, Any]:
    """All lines as JSON has them."""
    return {
        "could_run": could_run(nodes),
        "nodes": {name: [asdict(line) for line in lines] for name, lines in nodes.items()},
    }


def table(nodes: Mapping[str, Sequence[Line]]) -> str:
    """A table for each node; what to do stands below the line that it is about. Nodes of which all is the same are told
    of together."""
    alike: dict[tuple[Line, ...], list[str]] = {}
    for name, lines in nodes.items():
        alike.setdefault(tuple(lines), []).append(name)
    width = max((len(line.what) for lines in nodes.values() for line in lines), default=0)
    text: list[str] = []
    for lines, names in alike.items():
        text += [f"{', '.join(names)}:", *_rows(lines, width), ""]
    bad = sum(line.verdict == "bad" for lines in nodes.values() for line in lines)
    text.append(f"a job could not run: {counted(bad, 'fault')}" if bad else "a job could run")
    return "\n".join(text)


def _rows(lines: Sequence[Line], width: int) -> list[str]:
    rows = []
    for line in lines:
        rows.append(f"  {WORDS[line.verdict]:<4}  {line.what:<{width}}  {line.value}")
        if line.advice:
            rows.append(f"  {'':<4}  {'':<{width}}  -> {line.advice}")
    return rows
