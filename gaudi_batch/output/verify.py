"""Reads images back and compares them with their manifests."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from gaudi_batch.errors import StorageError
from gaudi_batch.layout import DATA, IMAGES, METADATA, attempt_name
from gaudi_batch.output.manifest import CommitInfo
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.text import counted

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
    """Objects that a manifest names and storage does not have."""
    torn: list[str] = field(default_factory=list)
    """Objects whose bytes do not have the manifest's SHA-256: cut short or changed."""
    foreign: list[str] = field(default_factory=list)
    """Objects beside images that no manifest names."""
    broken: dict[int, int] = field(default_factory=dict)
    """The rows with missing or torn images, each with its shard."""
    images_of: dict[int, int] = field(default_factory=dict)
    """How many images manifests name of each of these rows."""

    def describe(self) -> dict[str, Any]:
        """The content of verify.json."""
        described = asdict(self) | {"broken": sorted(self.broken)}
        del described["images_of"]
        return described

    @property
    def damage(self) -> str:
        """How much is missing and torn; of objects with many images, how many rows these have."""
        damage = f"{len(self.missing)} missing, {len(self.torn)} torn"
        if not any(path.startswith(f"{DATA}/") for path in (*self.missing, *self.torn)):
            return damage
        return f"{damage} of their objects, with {counted(len(self.broken), 'row')}"

    def lines(self) -> list[str]:
        """A few lines for a person."""
        lines = [f"verified {self.images} images: {self.damage}, {len(self.foreign)} foreign"]
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
        if path.startswith(f"{DATA}/"):
            digest = storage.sha256(path)
        else:
            data = storage.get(path)  # in one request, as an image is small
            digest = None if data is None else hashlib.sha256(data).hexdigest()
        return "missing" if digest is None else "" if digest == sha256 else "torn"

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for info, table in ledger.read_commits(list(left)):
            del left[info.shard]
            images = [row for row in table.select(["row", "path", "sha256"]).to_pylist() if row["path"]]
            counting = [image for image in images if latest_shard_of_row.get(image["row"], 0) <= info.shard]
            report.images += len(counting)
            images_of = Counter(image["row"] for image in counting)
            rows_of: dict[str, list[int]] = {}
            for image in counting:
                rows_of.setdefault(image["path"], []).append(image["row"])
            sums = {image["path"]: info.object_sha256 or image["sha256"] for image in counting}
            for path, difference in zip(sums, pool.map(differs, sums, sums.values()), strict=True):
                if difference:
                    getattr(report, difference).append(path)
                    for row in rows_of[path]:
                        report.broken[row] = info.shard
                        report.images_of[row] = images_of[row]
            named = {image["path"] for image in images}
            if not info.has_members:
                directory = f"{IMAGES}/{attempt_name(info.shard, info.attempt)}"
                paths = (f"{directory}/{name}" for name in storage.names(directory))
                report.foreign += [path for path in paths if path not in named]
    if left:
        raise StorageError(f"{storage.url}: {len(left)} manifests are gone or torn, the first of shard {min(left)}")
    return report


def foreign_attempts(ledger: OutputReader, commits: Iterable[CommitInfo]) -> list[str]:
    """What lies beside images and belongs to none of these commits. Raises StorageError."""
    known = {METADATA.partition(".")[0], *(attempt_name(info.shard, info.attempt) for info in commits)}
    names = ((place, name) for place in (IMAGES, DATA) for name in ledger.storage.names(place))
    return [f"{place}/{name}" for place, name in names if name.partition(".")[0] not in known]
