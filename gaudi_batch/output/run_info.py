"""What run.json says of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from gaudi_batch.config.bounds import Bounds
from gaudi_batch.job import Fixed

_BOUNDS = TypeAdapter(Bounds)


@dataclass(frozen=True)
class RunRecord:
    """What run.json says."""

    job: dict[str, Any]
    """The job's config, secrets taken out."""
    fingerprint: dict[str, Any]
    versions: dict[str, str]
    """Of the packages of the machine that began the run, which makes no image."""
    created_at: str
    rows: int
    images: int
    """Images that the plan asks for; rows that can't be run are found later."""
    run_id: str = ""
    """Chosen at random; each manifest of the run has it."""
    stacks: Sequence[Mapping[str, str]] | None = None
    """What has shaped its images, by the word of its cards (stack.py), in order: one more where the cards of a driver
    have another than those before, so that one may be there twice; {} for what an older version made, which did not ask
    them, and None as long as it is alone."""

    grown: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Each time that the run got more rows: `time`, `rows` and `images` that it had until then, and the `files` that
    were new to it."""

    @property
    def threads(self) -> int | None:
        """Threads of a card, as the first driver fixed them."""
        return self.fingerprint.get("threads")

    @property
    def bounds(self) -> Bounds | None:
        """What a row may ask for at most; None where a version without bounds began the run."""
        return _BOUNDS.validate_python(self.fingerprint) if "max_pixels" in self.fingerprint else None

    @property
    def fixed(self) -> Fixed:
        """What its first driver has fixed for all that come after it."""
        return Fixed(self.threads, self.bounds, self.job.get("max_pixels"))

    @property
    def asked_no_card(self) -> bool:
        """Whether a version began the run that did not ask the cards; its threads may be more than any node's CPUs."""
        return self.stacks is None or {} in self.stacks
