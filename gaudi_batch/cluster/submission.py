"""What is sent to a cluster as a job, and what the cluster keeps of it.

What travels is a job file of the fields that were set, in a working directory of its own, and nothing else. Credentials
do not: whoever may look at the cluster's jobs would see them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.errors import InputError
from gaudi_batch.redaction import has_secret, redact, redacted_options

JOB_FILE = "job.yaml"
START_FILE = "start.py"
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""An id that can be part of addresses and file names."""
SUBMISSION_VARIABLE = "GAUDI_BATCH_SUBMISSION"
"""Environment variable of a submitted job: the id that a request to stop it has to name."""
TELLS = (
    "would tell; give the nodes their credentials by their environment (AWS_ACCESS_KEY_ID,"
    " GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_CONNECTION_STRING) or by their role"
)


@dataclass(frozen=True)
class Submission:
    """What is asked of a cluster.

    Args:
        config: the job; all its paths are as the nodes see them.
        flags: of `gaudi-batch run` beside the job.
        grace: seconds that the driver may take to commit what it has begun once it is told to stop.
        job_id: what to call it; None chooses.
        ship_code: whether the nodes are to use this installation's gaudi_batch and not their own.
    """

    config: JobConfig
    flags: Sequence[str]
    grace: float
    job_id: str | None = None
    ship_code: bool = False

    def __post_init__(self) -> None:
        if self.job_id is not None and not JOB_ID.fullmatch(self.job_id):
            raise InputError(f"--job-id {self.job_id!r}: letters, digits, '.', '_' and '-' make an id")

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs."""
        return shlex.join(["python3", START_FILE, "run", JOB_FILE, "--grace", f"{self.grace:g}", *self.flags])

    @property
    def job_file(self) -> str:
        """The job as YAML."""
        return yaml.safe_dump(self.config.model_dump(mode="json", exclude_unset=True), sort_keys=False)


PATHS = ("prompts", "output", "gaudi.recipe_store", "gaudi.quantize.config")
"""Fields that name a path or a URL; others may name what is on a hub."""


def require_portable(config: JobConfig) -> None:
    """Refuses a job that means something on this machine alone, or has a secret that the cluster would record.

    Raises:
        InputError: a path is relative, or there is a secret in it.
    """
    named = {"prompts": config.prompts, "output": config.output, "model": config.model}
    named |= {f"lora[{number}].path": lora.path for number, lora in enumerate(config.lora)}
    if isinstance(config.gaudi.config, str):
        named["gaudi.config"] = config.gaudi.config
    if config.gaudi.recipe_store not in (None, "output"):
        named["gaudi.recipe_store"] = config.gaudi.recipe_store
    if config.gaudi.quantize is not None:
        named["gaudi.quantize.config"] = config.gaudi.quantize.config
    for name, value in named.items():
        if value is None:
            continue
        relative = "://" not in value and not Path(value).is_absolute()
        # The others may be names on a hub.
        if relative and (name in PATHS or value.startswith((".", "~")) or Path(value).exists()):
            raise InputError(
                f"{name}: {value!r} is a path of this machine; a job on a cluster needs a URL, or an absolute path on a"
                " file system that all nodes share"
            )
        if has_secret(value):
            raise InputError(f"{name}: {redact(value)!r} has a secret in it, which the cluster's list of jobs {TELLS}")
    for name in ("storage_options", "prompts_storage_options"):
        options: Mapping[str, Any] = getattr(config, name) or {}
        if redacted_options(options) != options:
            raise InputError(f"{name}: holds a secret, which the cluster's list of jobs {TELLS}")
    for number, told in enumerate(config.on_end):
        if told.tells_url or has_secret(told.command or ""):
            raise InputError(
                f"on_end[{number}]: holds a URL or a secret, which the cluster's list of jobs would tell; put it into a"
                " variable of the environment of the cluster's head and name that, as in on_end: ${SLACK_WEBHOOK}"
            )


@dataclass(frozen=True)
class Submitted:
    """What the cluster keeps of a job that was submitted."""

    submission: str
    output: str
    storage_options: Mapping[str, Any]
    grace: float
    """Its own, in seconds."""

    def metadata(self) -> dict[str, str]:
        """As the Jobs API keeps it."""
        return {
            "gaudi_batch": self.submission,
            "output": self.output,
            "storage_options": json.dumps(dict(self.storage_options)),
            "grace": f"{self.grace:g}",
        }

    @classmethod
    def read(cls, metadata: Mapping[str, str] | None) -> Submitted | None:
        """Reads what the Jobs API keeps; None if an older version, or something else, submitted the job."""
        try:
            kept = dict(metadata or {})
            options = json.loads(kept["storage_options"])
            return cls(kept["gaudi_batch"], kept["output"], dict(options), float(kept["grace"]))
        except (KeyError, ValueError, TypeError):
            return None
