"""A job, resolved: the config together with what its prompts, its model and its machine turn out to be.

All that can be wrong with a job is found here, before any card is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gaudi_batch.config.bounds import Bounds, bounds_for
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import OUTPUT
from gaudi_batch.dataset.discovery import open_prompts
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.dataset.rows import SHAPE_COLUMNS, RowRules, make_row
from gaudi_batch.dataset.scan import planned_groups, row_spans
from gaudi_batch.errors import HubUnreachable, InputError
from gaudi_batch.pipelines.cpus import usable_cpus
from gaudi_batch.pipelines.families import FAMILIES
from gaudi_batch.pipelines.gaudi_environment import gaudi_mapping
from gaudi_batch.pipelines.sources import ModelInfo, describe_model, read_gaudi_config, unseen_model
from gaudi_batch.pipelines.stack import versions
from gaudi_batch.plan import Bucket, Shard
from gaudi_batch.planner import ShardSizes, plan_shards
from gaudi_batch.redaction import redacted_options
from gaudi_batch.storage.filesystem import open_filesystem

DEFAULT_CARDS = 2
"""Cards of a machine or cluster that has none, for the devices cpu and simulated."""

LORA_COLUMN = "lora"
"""A column that would ask for another LoRA in each row."""
SHAPING_PACKAGES = ("torch", "diffusers", "transformers", "optimum-habana", "numpy", "pillow", "gaudi-batch")
"""The driver's versions of these are recorded for people; the cards' versions, which count, are in stack.py."""


@dataclass(frozen=True)
class Fixed:
    """What the first driver of a run has fixed for all that come after it."""

    threads: int | None
    """Threads of one card; None where images do not depend on them."""
    bounds: Bounds | None
    """What a row may ask for; None in a run that a version without bounds began."""
    max_pixels: int | None
    """The job's max_pixels, from which the bounds come."""
    carry: tuple[str, ...]
    """The columns that its manifests carry."""
    fused_attention: bool
    """Whether its Gaudi cards fuse attention; an older version did not."""


@dataclass(frozen=True)
class Job:
    """A resolved job.

    Args:
        config: as the user gave it, with `device` resolved.
        dataset: its prompts.
        model: its model.
        threads: threads of one card, on which images depend on the cpu; on hpu, None is its share of its own node.
        bounds: what a row may ask for; None in a run that a version without bounds began.
    """

    config: JobConfig
    dataset: PromptDataset
    model: ModelInfo
    threads: int | None
    bounds: Bounds | None

    @property
    def rules(self) -> RowRules:
        """What a row gets for the fields that it leaves open."""
        config, family = self.config, self.model.family
        return RowRules(
            Bucket(
                config.width or self.model.width,
                config.height or self.model.height,
                config.steps or family.steps,
                family.guidance_scale if config.guidance_scale is None else config.guidance_scale,
            ),
            config.num_images,
            config.negative_prompt,
            family.multiple,
            self.bounds,
            takes_negative=family.negative is not None,
            takes_guidance=family.takes_guidance,
        )

    @property
    def dtype(self) -> str:
        """The dtype that the model computes in."""
        if self.config.dtype is None and self.config.device == "hpu" and self.config.gaudi.mode == "lazy":
            return "autocast to bfloat16" if gaudi_mapping(self.config).get("use_torch_autocast") else "float32"
        return self.config.dtype or "float32"

    @property
    def batches(self) -> int:
        """The batches that its images fill, if no row asks for a number of its own and none is left half empty."""
        return -(-self.total_rows * self.config.num_images // self.config.batch_size)

    @property
    def reads_shapes(self) -> bool:
        """Whether columns of the prompts are read to plan it."""
        return not self.dataset.columns.keys().isdisjoint(SHAPE_COLUMNS)

    @property
    def total_rows(self) -> int:
        """Rows of the dataset that the job takes."""
        return min(self.dataset.rows, self.config.limit or self.dataset.rows)

    def plan(self, cards: int, since: int = 0, first: int = 0) -> Iterator[Shard]:
        """The shards of the job, from the dataset.

        Args:
            cards: how many cards it may have.
            since: the first row to plan.
            first: number of the first shard.
        """
        config = self.config
        groups = () if config.shard_size else planned_groups(self.dataset, range(since, self.total_rows))
        sizes = ShardSizes(config.batch_size, config.num_images, config.shard_size, cards, groups)
        return plan_shards(
            row_spans(self.dataset, self.rules, config.limit, since, scattered=True),
            self.total_rows - since,
            sizes,
            first,
        )

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which images the job makes; only a job with the same fingerprint may resume a run."""
        config = self.config
        same = config.model_dump(
            mode="json",
            include={
                "columns",
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
            same["gaudi"] = config.gaudi.shaping()
            if config.gaudi.fused_attention:
                same["gaudi"]["fused_attention"] = True
        bucket = self.rules.bucket
        if not config.use_safetensors:
            same["use_safetensors"] = False
        if config.encoding.type == "png":
            del same["encoding"]["quality"]
        if self.bounds is not None:
            same |= asdict(self.bounds)
        if self.model.loras:
            same["lora"] = [lora.describe() for lora in self.model.loras]
        if not self.dataset.carries_all:
            same["carry"] = self.dataset.carried.names
        return same | {
            "model": self.model.name,
            "model_revision": self.model.revision,
            **bucket._asdict(),
            "scheduler": self.model.scheduler,
            "dtype": self.dtype,
            "threads": self.threads if config.device == "cpu" else None,
            "files": {file.name: file.identity for file in self.dataset.files},
        }

    def describe(self) -> dict[str, Any]:
        """The job as run.json has it, without secrets."""
        return redacted_options(self.config.model_dump(mode="json"))

    def versions(self) -> dict[str, str]:
        """Versions of packages that shape images, on this machine; those of the cards are in `stacks`."""
        return versions(SHAPING_PACKAGES)


def resolve(config: JobConfig, fixed: Fixed | None = None, *, offline: bool = False) -> Job:
    """Finds a job's prompts and model, and checks that they go together.

    Args:
        config: the job, with a device other than auto.
        fixed: of the run in its output, if there is one; it is kept.
        offline: do with what the job itself says of a hub model that can't be reached; it can be checked, not run.

    Raises:
        InputError: the job can't be run as it is.
        StorageError: the prompts' storage failed.
    """
    open_filesystem(config.output, config.storage_options)
    recipe_store = config.gaudi.recipe_store
    if recipe_store is not None and recipe_store != OUTPUT:
        open_filesystem(recipe_store, config.options_for(recipe_store))
    is_lazy = config.device == "hpu" and config.gaudi.mode == "lazy"
    if is_lazy:
        changes: dict[str, Any] = {"config": read_gaudi_config(config.gaudi.config)}
        if config.gaudi.fused_attention is None:
            changes["fused_attention"] = fixed.fused_attention if fixed else True
        config = config.model_copy(update={"gaudi": config.gaudi.model_copy(update=changes)})
    try:
        model = describe_model(config)
        own = model.width, model.height
    except HubUnreachable:
        if not offline or config.width is None or config.height is None:
            raise
        model = unseen_model(config, config.width, config.height)
        own = 0, 0
    family = model.family
    for name in ("width", "height"):
        side = getattr(config, name)
        if side is None and not getattr(model, name):
            raise InputError(f"model {model.name!r} does not say how large its images are; name width and height")
        if side is not None and side % family.multiple:
            raise InputError(f"{name} is {side}; model {model.name!r} needs a multiple of {family.multiple}")
    if family.attention == "fused" and is_lazy and config.gaudi.fused_attention is False:
        raise InputError(f"gaudi.fused_attention is false; optimum-habana's {family.gaudi_class} always fuses it")
    if config.device == "hpu" and config.gaudi.quantize is not None and not family.quantizes:
        known = dict.fromkeys(each.pipeline_class for each in FAMILIES if each.quantizes)
        raise InputError(
            f"gaudi.quantize: optimum-habana's {family.gaudi_class} knows no eight-bit floats; those of"
            f" {', '.join(known)} do"
        )
    quantize = config.gaudi.quantize if config.device == "hpu" else None
    if quantize is not None and quantize.mode == "measure" and config.cards != 1:
        raise InputError(
            f"gaudi.quantize: mode measure writes the scales of a card to one file, and cards is {config.cards}; take"
            " --cards 1"
        )
    if config.device == "hpu" and config.dtype is None:
        config = config.model_copy(update={"dtype": family.hpu_dtype if is_lazy else "bfloat16"})
    threads = config.cpu.threads or (fixed.threads if fixed else None)
    if config.device == "cpu" and threads is None:
        threads = max(1, usable_cpus() // (DEFAULT_CARDS if config.cards == "all" else config.cards))
    if fixed and fixed.max_pixels == config.max_pixels:
        bounds = fixed.bounds
    else:
        bounds = bounds_for(*own, config.max_pixels)
    if fixed and config.carry is None:
        config = config.model_copy(update={"carry": list(fixed.carry)})
    job = Job(config, open_prompts(config), model, threads, bounds)
    if fixed is None and LORA_COLUMN in job.dataset.carried.names:
        raise InputError(
            f"prompts: column {LORA_COLUMN!r} asks for a LoRA a row, and a card's graphs have one set of LoRAs; make a"
            " job of each style, with its prompts and its lora, or leave the column out of carry"
        )
    if bounds is not None:
        _refuse_beyond_bounds(job)
    return job


def _refuse_beyond_bounds(job: Job) -> None:
    """Refuses a job that asks for more than a row may. Raises InputError."""
    values = job.rules.bucket._asdict() | {"prompt": "-", "negative_prompt": job.config.negative_prompt}
    error = make_row(0, values, job.rules).error
    if error is not None:
        raise InputError(f"the job's own {error}")
