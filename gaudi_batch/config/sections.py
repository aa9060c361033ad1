"""The parts of a job that have fields of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from gaudi_batch.text import did_you_mean

GAUDI_FIELDS = (
    "use_torch_autocast",
    "autocast_bf16_ops",
    "autocast_fp32_ops",
    "use_dynamic_shapes",
    "use_fused_adam",
    "use_fused_clip_norm",
)
"""What `GaudiSettings` of optimum-habana 1.21.2 knows."""


def check_gaudi_fields(value: Mapping[str, Any]) -> None:
    """Raises a ValueError if a Gaudi config has other fields, or other types, than optimum-habana knows."""
    for key, field in value.items():
        if key not in GAUDI_FIELDS:
            raise ValueError(
                f"{key!r} is not a field of a Gaudi config; {did_you_mean(key, GAUDI_FIELDS)}those are"
                f" {', '.join(GAUDI_FIELDS)}"
            )
        if key.endswith("_ops"):
            if field is not None and not (isinstance(field, list) and all(isinstance(op, str) for op in field)):
                raise ValueError(f"{key} must be a list of names of operations, or null")
        elif not isinstance(field, bool):
            raise ValueError(f"{key} must be true or false")
    if (value.get("autocast_bf16_ops") is None) != (value.get("autocast_fp32_ops") is None):
        raise ValueError("autocast_bf16_ops and autocast_fp32_ops go together; optimum-habana passes over one alone")


PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a job: immutable, and with no other fields than it declares."""

    # An error that quotes what it was given would show the secrets of a job.
    # What a field means stands below it and is read where help is made: pydantic would read it in every process.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, hide_input_in_errors=True)


class EncodingConfig(Section):
    """How an image becomes bytes."""

    short_for: ClassVar[str] = "type"
    """The field that a text in place of the mapping is for: `encoding: jpeg`."""

    type: Literal["png", "jpeg", "webp"] = "png"
    """File type of the images."""

    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of jpeg and webp, 1 to 100; png is lossless and ignores it."""

    @model_validator(mode="before")
    @classmethod
    def _type_alone(cls, value: Any) -> Any:
        return {cls.short_for: value} if isinstance(value, str) else value


class CpuConfig(Section):
    """Settings of `device: cpu`."""

    threads: PositiveInt | None = None
    """Threads of one card. Null on the cpu is its share of the CPUs that the driver may use (affinity, cgroup), fixed
    in run.json as the run begins; null on hpu is the card's share of those that its own node may use."""


class GaudiSettings(Section):
    """Settings of `device: hpu`."""

    config: dict[str, Any] | str = Field(default_factory=lambda: {"use_torch_autocast": True})
    """Gaudi config of optimum-habana: fields, or a hub id or path of a gaudi_config.json."""

    hpu_graphs: bool = True
    """Whether to capture the UNet as an HPU graph and replay it."""

    fused_attention: bool | None = None
    """Whether the UNet's attention is Intel's fused kernel; if so, other attention may reduce in bfloat16, too. Null is
    true for a new run, and for one that is resumed what it began with; an older version began runs without."""

    max_graphs: PositiveInt = 16
    """Graph keys whose graphs a card keeps; for one more the least recently used is given up, or all, as docs/gaudi.md
    says of each model."""

    recipe_cache: str | None = "${HOME}/.cache/gaudi-batch/recipes"
    """Directory on each node's own disk for compiled recipes, which its cards share; null keeps none."""

    recipe_cache_mb: PositiveInt = 16384
    """Size of that directory in MB, beyond which the oldest recipes are removed."""

    @field_validator("config")
    @classmethod
    def _known_fields(cls, value: dict[str, Any] | str) -> dict[str, Any] | str:
        if isinstance(value, dict):
            check_gaudi_fields(value)
        elif not value.strip():
            raise ValueError("must be a mapping, a hub id or a path")
        return value


class SimulatedConfig(Section):
    """Settings of `device: simulated`."""

    batch_seconds: Annotated[float, Field(ge=0)] = 0.885
    """Seconds that a card takes for one batch."""

    seconds_by_size: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Seconds instead of these for batches of some sizes, as {1024x1024: 3.5}."""

    capture_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds more that the first batch of a graph key takes on a card."""

    load_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a card takes to load its pipeline."""

    raise_rows: tuple[int, ...] = ()
    """Rows for which the pipeline raises."""

    kill_rows: tuple[int, ...] = ()
    """Rows that kill the card's process."""

    kill_node_rows: tuple[int, ...] = ()
    """Rows that end the card's node: Ray's own process there is killed."""

    hang_rows: tuple[int, ...] = ()
    """Rows for which the pipeline never returns."""

    broken_modules: tuple[int, ...] = ()
    """Modules on which every call raises."""

    unloadable_modules: tuple[int, ...] = ()
    """Modules on which loading raises."""

    lying_modules: tuple[int, ...] = ()
    """Modules on which images now and then are not finite, others each time."""

    lying_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """The share of their images that is."""


class LimitsConfig(Section):
    """Seconds after which a card that is in the same phase still is killed and replaced."""

    loading: Annotated[float, Field(gt=0)] = 1800.0
    """Loading the pipeline, a download among it. Reading the rows of a shard may take as long, and storage_patience
    more."""

    first_batch: Annotated[float, Field(gt=0)] = 1800.0
    """The first batch of a graph key, which compiles; and any batch before one of its size and steps has been seen."""

    batch: Annotated[float, Field(gt=0)] = 60.0
    """Later batches; never less than 10 times the longest seen of the same size and steps, guided or not."""

    answer: Annotated[float, Field(gt=0)] = 60.0
    """No answer from a card's process while nothing is being generated."""

    cluster: Annotated[float, Field(gt=0)] = 1800.0
    """A cluster without a card that works, before the run stops. A run that never had one waits for it only with
    min_cards or max_cards."""
