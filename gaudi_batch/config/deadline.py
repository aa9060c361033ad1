"""The deadline of a job: a time with its zone, or how long its command may take."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from pydantic import AwareDatetime, TypeAdapter, ValidationError

_TIME = TypeAdapter(AwareDatetime)
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
"""How a time begins; a number alone would be read as seconds since the epoch."""
_NUMBER = r"(\d{1,6}(?:\.\d{1,6})?)"
_LENGTH = re.compile(rf"(?=\d)(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?")


def parse_deadline(text: str) -> datetime | timedelta:
    """Reads a deadline: ISO 8601 with a zone as `2026-12-01T08:00:00+01:00` or `...Z`, or a length of time as `8h`,
    `90m`, `1h30m`.

    Raises:
        ValueError: it is neither.
    """
    if match := _LENGTH.fullmatch(text.strip()):
        days, hours, minutes, seconds = (float(number or 0) for number in match.groups())
        length = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        if length:
            return length
    elif _DATE.match(text):
        try:
            return _TIME.validate_python(text)
        except ValidationError:
            pass
    raise ValueError(
        "must be a time with its zone, as 2026-12-01T08:00:00+01:00 or 2026-12-01T07:00:00Z, or a length of time more"
        " than 0, as 8h, 90m or 1h30m"
    )
