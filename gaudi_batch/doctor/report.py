"""What the doctor says, for a person and for a program."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gaudi_batch.doctor.line import Line
from gaudi_batch.text import counted

WORDS = {"ok": "ok", "note": "note", "bad": "BAD"}
NAMES = 4
"""More nodes than so many are counted, unless something is wrong with them."""
QUANTITY = re.compile(r"[+-]?\d+(?:\.\d+)?(?= (?:s|GiB)\b)")
"""Seconds and sizes, which differ from node to node where all is well."""


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
    """One table of all nodes, in which what is the same on several is one row; what to do stands below the row that it
    is about, and below both which nodes it is about, if not all."""
    rows: dict[str, dict[tuple[str, ...], dict[str, Line]]] = {}
    for name, lines in nodes.items():
        for line in lines:
            rows.setdefault(line.what, {}).setdefault(_alike(line), {})[name] = line
    width = max(map(len, rows), default=0)
    text = [f"{', '.join(nodes) if len(nodes) <= NAMES else counted(len(nodes), 'node')}:"]
    for what, kinds in rows.items():
        for own in kinds.values():
            (line, *_), below = own.values(), f"  {'':<4}  {'':<{width}}  "
            text.append(
                f"  {WORDS[line.verdict]:<4}  {what:<{width}}  {_values([line.value for line in own.values()])}"
            )
            if line.advice:
                text.append(f"{below}-> {line.advice}")
            if len(own) < len(nodes):
                text.append(f"{below}on {_whom(list(own), nodes, line)}")
    bad = sum(line.verdict == "bad" for lines in nodes.values() for line in lines)
    text += ["", f"a job could not run: {counted(bad, 'fault')}" if bad else "a job could run"]
    return "\n".join(text)


def _alike(line: Line) -> tuple[str, ...]:
    """What lines of one row have in common: all of a fault, else all but seconds and sizes."""
    return line.verdict, line.advice, line.value if line.verdict == "bad" else QUANTITY.sub("", line.value)


def _values(values: Sequence[str]) -> str:
    """The values of a row, whose seconds and sizes differ, as one."""

    def span(match: re.Match[str]) -> str:
        numbers = sorted(next(columns), key=float)
        return numbers[0] if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"

    columns = zip(*map(QUANTITY.findall, values), strict=True)
    return QUANTITY.sub(span, values[0])


def _whom(names: Sequence[str], nodes: Mapping[str, object], line: Line) -> str:
    others = [name for name in nodes if name not in names]
    if len(names) > NAMES and len(others) <= NAMES:
        return f"all but {', '.join(others)}"
    if len(names) > NAMES and line.verdict == "ok":
        return counted(len(names), "node")
    return ", ".join(names)
