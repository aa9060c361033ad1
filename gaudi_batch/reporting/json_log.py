"""Log lines for machines: `--log-format json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from gaudi_batch.redaction import redact

FIELDS = "fields"
"""The attribute of a record with further fields of its line, as `log.info(..., extra={FIELDS: {...}})` gives them."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, the fields that the record brings
    along, and `exception` where there is one. Without secrets, and in ASCII: whatever could steer a terminal or forge a
    line is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        when = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(_redacted(line), default=str).replace("\x7f", "\\u007f")


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the line of a run's end has of its summary.json."""
    return {name: value for name, value in summary.items() if not isinstance(value, (Mapping, list))}


def _redacted(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(name): _redacted(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item) for item in value]
    return value


def logs_json(logger: logging.Logger) -> bool:
    """Whether a logger's lines are for machines, so that nothing else belongs on their stream."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers)
