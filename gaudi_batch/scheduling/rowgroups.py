"""Row groups of the prompts whose reading has killed a card. Pure, a part of the schedule.

A row group often holds many shards, and what one of them finds out holds for all. So one shard, the first that died at
it, finds out from which row on a group can't be read; the others that touch the group wait meanwhile, and then read it
no further. Where it has found nothing, since all of its own rows can be read, the others are suspect, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gaudi_batch.plan import Shard
from gaudi_batch.scheduling.events import Reading


@dataclass
class _Group:
    span: range  # its rows, by their numbers in the file
    finder: int | None  # the shard that finds out which rows can't be read; None once that is known
    unreadable: tuple[int, str] | None = None  # the first row that can't be read, over all files, and the reason


@dataclass
class RowGroups:
    """What is known of row groups that have killed, by file and group."""

    known: int = 0
    """How many have killed."""
    undecided: int = 0
    """How many are still being found out about."""
    _groups: dict[int, dict[int, _Group]] = field(default_factory=dict)

    def killed(self, shard: Shard, reading: Reading) -> bool:
        """Notes that a process died decoding rows of a group for a shard, which now finds out about it unless another
        shard does; returns whether the group is new here."""
        groups = self._groups.setdefault(shard.file, {})
        known = reading.group in groups
        self.known += not known
        group = groups.setdefault(reading.group, _Group(reading.span, None))
        if group.finder is None:
            group.finder = shard.number
            self.undecided += 1
        return not known

    def mark_unreadable(self, shard: Shard, reading: Reading, reason: str) -> None:
        """Notes that from the first row of this reading on the group can't be read."""
        group = self._groups[shard.file][reading.group]
        if group.unreadable is None or reading.rows.start < group.unreadable[0]:
            group.unreadable = reading.rows.start, reason

    def settle(self, shard: int) -> bool:
        """Notes that a shard was read or given up; returns whether others may have waited for that."""
        if not self.undecided:
            return False
        own_groups = [group for groups in self._groups.values() for group in groups.values() if group.finder == shard]
        for group in own_groups:
            group.finder = None
        self.undecided -= len(own_groups)
        return bool(own_groups)

    def block(self, shard: Shard) -> bool:
        """Whether a shard has to wait for what another one finds out."""
        if not self.undecided:
            return False
        finders = {group.finder for _, group in self._touched(shard)} - {None}
        return bool(finders) and shard.number not in finders  # else two shards that find out would wait for each other

    def doubt(self, shard: Shard) -> bool:
        """Whether a shard touches a group that has killed and is still being found out about."""
        return bool(self.known) and any(group.unreadable is None for _, group in self._touched(shard))

    def by_row(self, shard: Shard) -> frozenset[int]:
        """The groups that a shard has to read a few rows at a time."""
        return frozenset(number for number, _ in self._touched(shard))

    def unreadable(self, shard: Shard) -> dict[int, tuple[int, str]]:
        """For each of these groups the first row that can't be read, with the reason."""
        return {number: group.unreadable for number, group in self._touched(shard) if group.unreadable is not None}

    def _touched(self, shard: Shard) -> list[tuple[int, _Group]]:
        groups = self._groups.get(shard.file, {})
        return [
            (number, group)
            for number, group in groups.items()
            if group.span.start < shard.stop and shard.start < group.span.stop
        ]
