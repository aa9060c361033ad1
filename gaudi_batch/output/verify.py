"""Reads images back and compares them with their manifests."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from gaudi_batch.errors import StorageError
from gaudi_batch.layout import attempt_name
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.reader import OutputReader

READ_THREADS = 16
SHOWN = 10
PATHS = ("missing", "torn", "foreign")
"""The lists of paths in a report."""


@dataclass
class VerifyReport:
    """The result of reading every image; paths are relative to the output."""

    images: int = 0
    """How many images manifests name."""
    missing: list[str] = field(default_factory=list)
    """Images that a manifest names and storage does not have."""
    torn: list[str] = field(default_factory=list)
    """Images whose bytes do not have the manifest's SHA-256: cut short or changed."""
    foreign: list[str] = field(default_factory=list)
    """Images that no manifest names."""
    broken: dict[int, int] = field(default_factory=dict)
    """The rows with missing or torn images, each with its shard."""
    images_of: dict[int, int] = field(default_factory=dict)
    """How many images manifests name of each of these rows."""

    def describe(self) -> dict[str, Any]:
        """The content of verify.json."""
        described = asdict(self) | {"broken": sorted(self.broken)}
        del described["images_of"]
        return described

    def lines(self) -> list[str]:
        """A few lines for a person."""
        lines = [
            f"verified {self.images} images: {len(self.missing)} missing, {len(self.torn)} torn,"
            f" {len(self.foreign)} foreign"
        ]
        for kind in PATHS:
            paths = getattr(self, kind)
            lines += [f"  {kind}: {path}" for path in paths[:SHOWN]]
            if len(paths) > SHOWN:
                lines.append(f"  {kind}: and {len(paths) - SHOWN} more, in verify.json")
        return lines

    def add(self, other: VerifyReport) -> None:
        """Adds the report of other shards."""
        self.images += other.images
        for name in PATHS:
            getattr(self, name).extend(getattr(other, name))
        self.broken |= other.broken
        self.images_of |= other.images_of

    def as_json(self) -> dict[str, Any]:
        """All of it, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> VerifyReport:
        """Reads what `as_json` gave. Raises KeyError, TypeError or ValueError if it is not that."""
        missing, torn, foreign = ([str(path) for path in stored[name]] for name in PATHS)
        broken, images_of = (
            {int(row): int(number) for row, number in stored[name].items()} for name in ("broken", "images_of")
        )
        return cls(int(stored["images"]), missing, torn, foreign, broken, images_of)


def verify(ledger: OutputReader, shards: Iterable[int], latest_shard_of_row: Mapping[int, int]) -> VerifyReport:
    """Reads every image that the manifests of some shards name, and lists the other files beside these images.

    Args:
        ledger: of the run.
        shards: which shards.
        latest_shard_of_row: rows of several shards, with the highest of these, which alone counts.

    Raises:
        StorageError: storage failed for longer than `storage_patience`, or a manifest is not there.
    """
    report = VerifyReport()
    storage = ledger.storage
    left = dict.fromkeys(shards)

    def differs(path: str, sha256: str) -> str:
        data = storage.get(path)
        return "missing" if data is None else "" if hashlib.sha256(data).hexdigest() == sha256 else "torn"

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for info, table in ledger.read_commits(list(left)):
            del left[info.shard]
            directory = attempt_name(info.shard, info.attempt)
            named = {row["path"]: row for row in table.select(["row", "path", "sha256"]).to_pylist() if row["path"]}
            counts = [path for path, row in named.items() if latest_shard_of_row.get(row["row"], 0) <= info.shard]
            report.images += len(counts)
            images_of = Counter(named[path]["row"] for path in counts)
            sums = [named[path]["sha256"] for path in counts]
            for path, difference in zip(counts, pool.map(differs, counts, sums), strict=True):
                if difference:
                    getattr(report, difference).append(path)
                    row = named[path]["row"]
                    report.broken[row] = info.shard
                    report.images_of[row] = images_of[row]
            paths = (f"images/{directory}/{name}" for name in storage.names(f"images/{directory}"))
            report.foreign += [path for path in paths if path not in named]
    if left:
        raise StorageError(f"{storage.url}: {len(left)} manifests are gone or torn, the first of shard {min(left)}")
    return report


def foreign_attempts(ledger: OutputReader, commits: Iterable[CommitInfo]) -> list[str]:
    """What lies in `images` and belongs to none of these commits. Raises StorageError."""
    attempts = {attempt_name(info.shard, info.attempt) for info in commits}
    return [f"images/{name}" for name in ledger.storage.names("images") if name not in attempts]
