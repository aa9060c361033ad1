"""A job, resolved: the config together with what its prompts, its model and its machine turn out to be.

All that can be wrong with a job is found here, before any card is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gaudi_batch.config import JobConfig
from gaudi_batch.cpus import usable_cpus
from gaudi_batch.errors import HubUnreachable, InputError
from gaudi_batch.filesystem import open_filesystem
from gaudi_batch.pipelines.gaudi import gaudi_mapping
from gaudi_batch.pipelines.model import ModelFacts, describe_model, read_gaudi_config, unseen_model
from gaudi_batch.plan import Bucket, Shard, plan_shards
from gaudi_batch.prompts import PromptDataset, open_prompts
from gaudi_batch.redaction import redacted_options
from gaudi_batch.rows import RowRules
from gaudi_batch.stack import versions

DEFAULT_CARDS = 2
"""Cards of a machine or cluster that has none, for the devices cpu and simulated."""

SHAPING_PACKAGES = ("torch", "diffusers", "transformers", "optimum-habana", "numpy", "pillow", "gaudi-batch")
"""Those of the driver are recorded, for a person to look at; what the cards have, which counts, is in stack.py."""


@dataclass(frozen=True)
class Job:
    """A resolved job.

    Args:
        config: as the user gave it, with `device` resolved.
        dataset: its prompts.
        model: its model.
        threads: threads of one card, on which images depend on the cpu; on hpu, None is its share of its own node.
    """

    config: JobConfig
    dataset: PromptDataset
    model: ModelFacts
    threads: int | None

    @property
    def rules(self) -> RowRules:
        """What a row gets where it says nothing."""
        config = self.config
        return RowRules(
            Bucket(
                config.width or self.model.width,
                config.height or self.model.height,
                config.steps,
                config.guidance_scale,
            ),
            config.num_images,
            config.negative_prompt,
            self.model.multiple,
        )

    @property
    def dtype(self) -> str:
        """What the model computes in."""
        if self.config.dtype is None and self.config.device == "hpu":
            return "autocast to bfloat16" if gaudi_mapping(self.config).get("use_torch_autocast") else "float32"
        return self.config.dtype or "float32"

    @property
    def total_rows(self) -> int:
        """Rows of the dataset that the job is about."""
        return min(self.dataset.rows, self.config.limit or self.dataset.rows)

    def plan(self) -> Iterator[Shard]:
        """The shards of the job, from the dataset."""
        return plan_shards(
            self.dataset.runs(self.rules, self.config.limit),
            self.total_rows,
            self.config.shard_size,
            self.config.batch_size,
            self.config.num_images,
        )

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which images the job makes; a run is resumed only by a job with the same."""
        config = self.config
        same = config.model_dump(
            mode="json",
            include={
                "columns",
                "steps",
                "guidance_scale",
                "negative_prompt",
                "num_images",
                "seed",
                "device",
                "batch_size",
                "limit",
                "format",
                "encoding",
            },
        )
        if config.device == "hpu":
            same["gaudi"] = config.gaudi.model_dump(mode="json", include={"config", "hpu_graphs"})
        bucket = self.rules.bucket
        if not config.use_safetensors:
            same["use_safetensors"] = False
        if config.encoding.type == "png":
            del same["encoding"]["quality"]
        return same | {
            "model": self.model.name,
            "model_revision": self.model.revision,
            "width": bucket.width,
            "height": bucket.height,
            "scheduler": self.model.scheduler,
            "dtype": self.dtype,
            "threads": self.threads if config.device == "cpu" else None,
            "files": {file.name: file.identity for file in self.dataset.files},
        }

    def describe(self) -> dict[str, Any]:
        """The job as run.json has it, secrets taken out."""
        return redacted_options(self.config.model_dump(mode="json"))

    def versions(self) -> dict[str, str]:
        """Versions of packages that shape images, as this machine has them; those of cards are in `stacks`."""
        return versions(SHAPING_PACKAGES)


def resolve(config: JobConfig, recorded_threads: int | None = None, *, offline: bool = False) -> Job:
    """Finds a job's prompts and model, and checks that they go together.

    Args:
        config: the job, with a device other than auto.
        recorded_threads: threads of a card as the run's first driver fixed them, if there was one.
        offline: do with what the job itself says of a hub model that can't be reached; it can be checked, not run.

    Raises:
        InputError: the job can't be run as it is.
        StorageError: the prompts' storage failed.
    """
    open_filesystem(config.output, config.storage_options)
    if config.device == "hpu":
        gaudi = config.gaudi.model_copy(update={"config": read_gaudi_config(config.gaudi.config)})
        config = config.model_copy(update={"gaudi": gaudi})
    try:
        model = describe_model(config)
    except HubUnreachable:
        if not offline or config.width is None or config.height is None:
            raise
        model = unseen_model(config, config.width, config.height)
    for name in ("width", "height"):
        side = getattr(config, name)
        if side is not None and side % model.multiple:
            raise InputError(f"{name} is {side}; model {model.name!r} needs a multiple of {model.multiple}")
    threads = config.cpu.threads or recorded_threads
    if config.device == "cpu" and threads is None:
        threads = max(1, usable_cpus() // (DEFAULT_CARDS if config.cards == "all" else config.cards))
    return Job(config, open_prompts(config), model, threads)


def refuse_bad_rows(job: Job, shown: int = 5) -> None:
    """Reads every row and refuses the job if one can't be run: what `--strict` does.

    Raises:
        InputError: with the first few such rows.
    """
    bad = 0
    lines: list[str] = []
    for shard in job.plan():
        for row in job.dataset.read(shard, job.rules)[0]:
            if row.error is not None:
                bad += 1
                if len(lines) < shown:
                    lines.append(f"row {row.row}: {row.error}")
    if bad:
        more = f" and {bad - len(lines)} more" if bad > len(lines) else ""
        raise InputError(f"--strict: {bad} rows can't be run: {'; '.join(lines)}{more}")
