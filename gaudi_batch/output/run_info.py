"""run.json: a run's job, versions, and what its cards have."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from pydantic import TypeAdapter

from gaudi_batch.config.bounds import Bounds
from gaudi_batch.job import Fixed, Job
from gaudi_batch.plan import Shard

_BOUNDS = TypeAdapter(Bounds)


def new_run_id() -> str:
    """A run id that no other run has."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class RunInfo:
    """The content of run.json."""

    job: dict[str, Any]
    """The job's config without secrets."""
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    """Versions of packages on the machine that began the run, which makes no image."""
    created_at: str
    rows: int
    images: int
    """Images that the plan asks for; rows that can't be run are found later."""
    run_id: str = ""
    """Chosen at random; each manifest of the run has it."""
    stacks: Sequence[Mapping[str, str]] | None = None
    """What shaped the images, as cards report it (stack.py), in order: a new entry whenever the cards of a driver have
    another stack than those before, so that one may be there twice; {} for images of an older version, which did not
    ask the cards, and None while that is the only one."""

    grown: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Each time that the run got more rows: `time`, `rows` and `images` that it had until then, and the `files` that
    were new to it."""

    @classmethod
    def of(cls, job: Job, shards: Sequence[Shard], run_id: str | None = None) -> RunInfo:
        """What is recorded of a job whose run begins now, with this plan; without a run id, it gets one."""
        return cls(
            job=job.describe(),
            fingerprint=job.fingerprint(),
            versions=job.versions(),
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            rows=job.total_rows,
            images=sum(shard.images for shard in shards),
            run_id=run_id or new_run_id(),
            stacks=[],
        )

    @classmethod
    def parse(cls, data: bytes) -> RunInfo:
        """Reads a run.json. Raises ValueError or TypeError if it is not one."""
        # It may have file names that are not UTF-8, which pydantic's JSON reader refuses.
        info = cls(**json.loads(data))
        for part in (info.job, info.fingerprint, info.versions):
            if not isinstance(part, dict):
                raise TypeError("a part of it is not an object")
        if not all(isinstance(count, int) and count >= 0 for count in (info.rows, info.images)):
            raise ValueError("its rows or images are no count")
        if not isinstance(info.job.get("device"), str):
            raise ValueError("its job has no device")
        if info.threads is not None and not (isinstance(info.threads, int) and info.threads > 0):
            raise ValueError("its threads are no count")
        _ = info.bounds
        if not all(isinstance(name, str) for name in info.fingerprint.get("carry", [])):
            raise TypeError("a column that its manifests carry is no text")
        if not isinstance(info.run_id, str):
            raise TypeError("its run_id is no text")
        if not isinstance(info.grown, list | tuple):
            raise TypeError("what it says of its growth is no list")
        for stack in info.stacks or ():
            if not (isinstance(stack, dict) and all(isinstance(value, str) for value in stack.values())):
                raise TypeError("a stack of it is no object of texts")
        return info

    def encode(self) -> bytes:
        """The bytes of run.json."""
        return (json.dumps(self.__dict__, indent=1) + "\n").encode()

    @property
    def threads(self) -> int | None:
        """Threads of a card, as the first driver fixed them."""
        return self.fingerprint.get("threads")

    @property
    def bounds(self) -> Bounds | None:
        """What a row may ask for; None if a version without bounds began the run."""
        return _BOUNDS.validate_python(self.fingerprint) if "max_pixels" in self.fingerprint else None

    @property
    def fixed(self) -> Fixed:
        """What the first driver has fixed for all later ones."""
        return Fixed(
            threads=self.threads,
            bounds=self.bounds,
            max_pixels=self.job.get("max_pixels"),
            carry=tuple(self.fingerprint.get("carry", "*")),
            fused_attention=self.fingerprint.get("gaudi", {}).get("fused_attention") is True,
        )

    @property
    def asked_no_card(self) -> bool:
        """Whether the version that began the run did not ask the cards; its threads may then be more than any node's
        CPUs."""
        return self.stacks is None or {} in self.stacks
