"""Counts failed rows by reason, in bounded memory, however many rows and reasons there are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from gaudi_batch.text import one_line

MAX_REASONS = 50
"""Most reasons that are counted separately; rows that failed for others are counted together."""
FIRST_IDS = 5
MAX_ID_SHOWN = 80
"""Most characters of an id that are shown; an id is the user's text."""
MAX_REASON_SHOWN = 300
OTHERS = "other reasons"
_VALUES = re.compile(r"""(?<!\w)'[^']*(?:'|$)|"[^"]*(?:"|$)|[-+]?\d+(?:[.,]\d+)*(?:[eE][-+]?\d+)?""")


@dataclass
class _Rows:
    first: str
    rows: int = 0
    first_ids: list[str] = field(default_factory=list)
    alike: bool = True

    @property
    def reason(self) -> str:
        return self.first if self.alike else f"{self.first} (others differ in the values)"

    def add(self, row_id: str) -> None:
        self.rows += 1
        if len(self.first_ids) < FIRST_IDS:
            self.first_ids.append(one_line(row_id, MAX_ID_SHOWN))


class Reasons:
    """Counts rows by the reason of their failure. Errors that differ only in numbers or quoted values have the same
    reason, named by the first of them; it says so if others differ."""

    def __init__(self) -> None:
        self._groups: dict[str, _Rows] = {}
        self._others = _Rows(OTHERS)

    def add(self, error: str, id: str) -> None:
        """Counts a row.

        Args:
            error: why it failed.
            id: the row's id.
        """
        error = one_line(error, MAX_REASON_SHOWN)
        key = _VALUES.sub("#", error)
        group = self._groups.get(key)
        if group is None:
            group = self._others
            if len(self._groups) < MAX_REASONS:
                group = self._groups[key] = _Rows(error)
        group.alike &= error == group.first or group is self._others
        group.add(id)

    def describe(self) -> list[dict[str, Any]]:
        """A record for each reason, the most frequent first, other reasons last: `reason` (printable, at most
        `MAX_REASON_SHOWN` characters), `rows` (how many), and `first_ids` (at most `FIRST_IDS`, printable and cut)."""
        groups = sorted(self._groups.values(), key=lambda group: -group.rows)
        groups += [self._others] if self._others.rows else []
        return [{"reason": group.reason, "rows": group.rows, "first_ids": list(group.first_ids)} for group in groups]


class FailedRows:
    """The failed rows of a run by reason, from its manifests.

    Args:
        latest_shard_of_row: rows of several shards, with the last of these, which alone counts.
    """

    def __init__(self, latest_shard_of_row: Mapping[int, int]) -> None:
        self._latest_shard_of_row = latest_shard_of_row
        self._reasons = Reasons()

    def add(self, shard: int, failed: pa.Table) -> None:
        """Counts the failed rows of a shard's manifest: `row`, `id` and `error` of each."""
        columns = failed.select(["row", "id", "error"]).to_pydict().values()
        for row, row_id, error in zip(*columns, strict=True):
            if self._latest_shard_of_row.get(row, shard) == shard:
                self._reasons.add(error or "", row_id or "")

    def describe(self) -> list[dict[str, Any]]:
        """See `Reasons.describe`."""
        return self._reasons.describe()


def reason_lines(described: Iterable[Mapping[str, Any]]) -> list[str]:
    """The records of `Reasons.describe`, a line for each."""
    lines = []
    for group in described:
        ids = ", ".join(map(str, group["first_ids"]))
        more = ", ..." if group["rows"] > len(group["first_ids"]) else ""
        rows = "1 row" if group["rows"] == 1 else f"{group['rows']} rows"
        lines.append(f"{rows}: {group['reason']} (id {ids}{more})")
    return lines
