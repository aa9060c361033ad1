"""Every image of a run read back and compared with its manifest."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from gaudi_batch.ledger import Ledger
from gaudi_batch.names import attempt_name

READ_THREADS = 16
SHOWN = 10


@dataclass
class Findings:
    """What a look at every image has shown; paths are relative to the output."""

    images: int = 0
    """How many are named by manifests."""
    missing: list[str] = field(default_factory=list)
    """Named and not there."""
    torn: list[str] = field(default_factory=list)
    """There, with other bytes than the manifest's SHA-256 says: cut short or changed."""
    foreign: list[str] = field(default_factory=list)
    """There, and named by no manifest."""
    broken: dict[int, str] = field(default_factory=dict)
    """The shards with missing or torn images, and their attempts."""

    def describe(self) -> dict[str, Any]:
        """What verify.json says."""
        return asdict(self) | {"broken": sorted(self.broken)}

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


def verify(ledger: Ledger) -> Findings:
    """Reads every image that a manifest names, and lists what else lies among them.

    Raises:
        StorageError: storage failed for longer than the patience.
    """
    findings = Findings()
    attempts: set[str] = set()
    storage = ledger.storage
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for facts, table in ledger.commits():
            directory = attempt_name(facts.shard, facts.attempt)
            attempts.add(directory)
            named = {
                path: sha256
                for path, sha256 in zip(
                    table.column("path").to_pylist(), table.column("sha256").to_pylist(), strict=True
                )
                if path is not None
            }
            findings.images += len(named)
            for path, data in zip(named, pool.map(storage.get, named), strict=True):
                if data is None:
                    findings.missing.append(path)
                elif hashlib.sha256(data).hexdigest() != named[path]:
                    findings.torn.append(path)
                else:
                    continue
                findings.broken[facts.shard] = facts.attempt
            there = (f"images/{directory}/{name}" for name in storage.names(f"images/{directory}"))
            findings.foreign += [path for path in there if path not in named]
    findings.foreign += [f"images/{name}" for name in storage.names("images") if name not in attempts]
    return findings
