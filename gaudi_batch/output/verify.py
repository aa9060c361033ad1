"""Reads every image of a run back and compares it with its manifest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from gaudi_batch.layout import attempt_name
from gaudi_batch.output.reader import OutputReader

READ_THREADS = 16
SHOWN = 10


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
        for kind in ("missing", "torn", "foreign"):
            paths = getattr(self, kind)
            lines += [f"  {kind}: {path}" for path in paths[:SHOWN]]
            if len(paths) > SHOWN:
                lines.append(f"  {kind}: and {len(paths) - SHOWN} more, in verify.json")
        return lines


def verify(ledger: OutputReader, latest_shard_of_row: Mapping[int, int]) -> VerifyReport:
    """Reads every image that a manifest names, and lists the other files among them.

    Args:
        ledger: of the run.
        latest_shard_of_row: rows of several shards, with the highest of these, which alone counts.

    Raises:
        StorageError: storage failed for longer than `storage_patience`.
    """
    report = VerifyReport()
    attempts: set[str] = set()
    storage = ledger.storage
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for info, table in ledger.commits():
            directory = attempt_name(info.shard, info.attempt)
            attempts.add(directory)
            named = {row["path"]: row for row in table.select(["row", "path", "sha256"]).to_pylist() if row["path"]}
            counts = [path for path, row in named.items() if latest_shard_of_row.get(row["row"], 0) <= info.shard]
            report.images += len(counts)
            images_of = Counter(named[path]["row"] for path in counts)
            for path, data in zip(counts, pool.map(storage.get, counts), strict=True):
                if data is None:
                    report.missing.append(path)
                elif hashlib.sha256(data).hexdigest() != named[path]["sha256"]:
                    report.torn.append(path)
                else:
                    continue
                row = named[path]["row"]
                report.broken[row] = info.shard
                report.images_of[row] = images_of[row]
            paths = (f"images/{directory}/{name}" for name in storage.names(f"images/{directory}"))
            report.foreign += [path for path in paths if path not in named]
    report.foreign += [f"images/{name}" for name in storage.names("images") if name not in attempts]
    return report
