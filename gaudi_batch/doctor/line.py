"""One line of what the doctor says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "bad"]
"""`bad`: a job could not run. `note`: it could, but slower or with a risk."""


@dataclass(frozen=True)
class Line:
    """What is known of one thing, and what to do about it."""

    what: str
    verdict: Verdict
    value: str
    advice: str = ""


def ok(what: str, value: str) -> Line:
    """All is well."""
    return Line(what, "ok", value)


def note(what: str, value: str, advice: str) -> Line:
    """A job could run, but slower or with a risk."""
    return Line(what, "note", value, advice)


def bad(what: str, value: str, advice: str) -> Line:
    """A job could not run."""
    return Line(what, "bad", value, advice)
