"""What a job is: one immutable `JobConfig`, read from YAML, flags or Python and validated once.

Every field is declared here alone: its type, its default, its rule and the sentence that explains it. The command
line makes its flags and their help from these declarations.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from gaudi_batch.dataset.rows import MAX_IMAGES, MAX_SEED
from gaudi_batch.errors import InputError
from gaudi_batch.redaction import redact, redacted_options
from gaudi_batch.text import load_yaml, name, nearest, shown

if TYPE_CHECKING:
    from typing_extensions import Self

PROMPT_COLUMNS = (
    "prompt",
    "id",
    "negative_prompt",
    "seed",
    "width",
    "height",
    "steps",
    "guidance_scale",
    "num_images",
)
"""The columns of a prompt dataset that mean something to the job; all others are carried into the manifest."""

GAUDI_FIELDS = (
    "use_torch_autocast",
    "autocast_bf16_ops",
    "autocast_fp32_ops",
    "use_dynamic_shapes",
    "use_fused_adam",
    "use_fused_clip_norm",
)
"""What `GaudiConfig` of optimum-habana 1.21.2 knows."""

MAX_JOB_FILE = 1 << 20
"""Bytes of a job file; a larger one is something else."""


def check_gaudi_fields(value: Mapping[str, Any]) -> None:
    """Raises a ValueError if a Gaudi config has other fields, or other types, than optimum-habana knows."""
    for key, field in value.items():
        if key not in GAUDI_FIELDS:
            raise ValueError(
                f"{key!r} is not a field of a Gaudi config; {_meant(key, GAUDI_FIELDS)}those are"
                f" {', '.join(GAUDI_FIELDS)}"
            )
        if key.endswith("_ops"):
            if field is not None and not (isinstance(field, list) and all(isinstance(op, str) for op in field)):
                raise ValueError(f"{key} must be a list of names of operations, or null")
        elif not isinstance(field, bool):
            raise ValueError(f"{key} must be true or false")
    if (value.get("autocast_bf16_ops") is None) != (value.get("autocast_fp32_ops") is None):
        raise ValueError("autocast_bf16_ops and autocast_fp32_ops go together; optimum-habana passes over one alone")


def _meant(given: str, known: Iterable[str]) -> str:
    near = nearest(given, known)
    return f"did you mean {near!r}? " if near else ""


PositiveInt = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    # An error that quotes what it was given would show the secrets of a job.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, hide_input_in_errors=True)


class EncodingConfig(_Section):
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


class CpuConfig(_Section):
    """Settings of `device: cpu`."""

    threads: PositiveInt | None = None
    """Threads of one card. Null on the cpu is its share of the CPUs that the driver may use (affinity, cgroup), fixed
    in run.json as the run begins; null on hpu is the card's share of those that its own node may use."""


class GaudiConfig(_Section):
    """Settings of `device: hpu`."""

    config: dict[str, Any] | str = Field(default_factory=lambda: {"use_torch_autocast": True})
    """Gaudi config of optimum-habana: fields, or a hub id or path of a gaudi_config.json."""

    hpu_graphs: bool = True
    """Whether to capture the UNet as an HPU graph and replay it."""

    max_graphs: PositiveInt = 16
    """Graph keys whose graphs a card keeps; the least recently used is given up for one more."""

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


class SimulatedConfig(_Section):
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


class LimitsConfig(_Section):
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


class JobConfig(_Section):
    """A text-to-image job: which prompts, which model, which cards, where the images go.

    Its `repr` and `str` have `***` in place of what is secret; its fields and `model_dump` are as they were given.

    Raises:
        InputError: a value breaks its rule; the message names each field, its value and the rule.
    """

    prompts: str
    """Parquet file, directory or glob of prompts: a path, relative to the working directory and not to the job file,
    or a URL of S3, Google, Azure, http(s) or hf."""

    output: str
    """Where the images and their records go: a directory, relative to the working directory, or a URL of S3, Google
    Cloud Storage or Azure."""

    model: str | None = None
    """Hub id or directory of the model, or builtin:shapes; the simulated device needs none."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    use_safetensors: bool = True
    """Whether only safetensors are loaded; false takes pickled weights (.bin), too, of a component that has no
    others. They are read with torch's weights_only, which runs no code of theirs."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the dataset's columns where they are not ours, as {ours: theirs} or ours=theirs,ours=theirs; ours is
    one of prompt, id, negative_prompt, seed, width, height, steps, guidance_scale, num_images."""

    device: Literal["auto", "hpu", "cpu", "simulated"] = "auto"
    """What generates: hpu (optimum-habana), cpu (diffusers) or simulated (sleeps and paints); auto is hpu where the
    cluster has Gaudi cards, else cpu."""

    cards: Literal["all"] | PositiveInt = "all"
    """Cards to use; all is every card of the cluster, or 2 where there is none. For one that is quarantined another is
    taken, as far as the cluster has any."""

    min_cards: Annotated[int, Field(ge=0)] = 0
    """Cards to ask the cluster for, whatever it has and however little there is to do."""

    max_cards: PositiveInt | None = None
    """Cards to ask the cluster's autoscaler for as long as there is work for them; null asks for none. For a node of
    which no card works another is asked for, up to as many cards on top."""

    batch_size: PositiveInt = 8
    """Images that one pipeline call makes."""

    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    """Images per prompt (this and the next six: per row where the row says so)."""

    steps: PositiveInt = 50
    """Denoising steps."""

    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 7.5
    """Classifier-free guidance; 1 or less turns it off."""

    width: PositiveInt | None = None
    """Width in pixels; null is the model's own."""

    height: PositiveInt | None = None
    """Height in pixels; null is the model's own."""

    max_pixels: PositiveInt | None = None
    """Pixels of an image (width times height) beyond which its row fails. Null is the larger of 2048 x 2048 and four
    times the model's own, and no side over 8192; a number alone decides."""

    negative_prompt: str | None = None
    """What the images should not show."""

    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of the run, from which rows without a seed get theirs."""

    scheduler: str | None = None
    """Scheduler by name; null is ddim for Stable Diffusion 1 and 2, else the model's own."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type that the model computes in; null is float32 on the cpu, and as the Gaudi config says on hpu."""

    format: Literal["files"] = "files"
    """How images are kept: files, one object an image."""

    encoding: EncodingConfig = Field(default_factory=EncodingConfig)
    """How an image becomes bytes."""

    shard_size: PositiveInt = 256
    """Prompts in a shard, the unit of dispatch and of commit."""

    limit: PositiveInt | None = None
    """Only the first n rows, to try a job."""

    max_failed: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, le=1)] | None = None
    """Failed rows that stop the run: more than this count (a whole number), or than this share (0.05 or 5%, up to 1.0
    or 100%) of all rows."""

    storage_options: dict[str, Any] = Field(default_factory=dict)
    """fsspec options of the output's storage."""

    prompts_storage_options: dict[str, Any] | None = None
    """fsspec options of the prompts' storage; null takes storage_options where both are on one protocol."""

    storage_patience: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for which failing storage is tried again before the run stops."""

    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """Time limits of a card's phases."""

    cpu: CpuConfig = Field(default_factory=CpuConfig)
    """Settings of device cpu."""

    gaudi: GaudiConfig = Field(default_factory=GaudiConfig)
    """Settings of device hpu."""

    simulated: SimulatedConfig = Field(default_factory=SimulatedConfig)
    """Settings of device simulated."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for field, value in super().__repr_args__():
            yield field, redacted_options({"": value})[""]

    @field_validator("prompts", "output")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a path or URL")
        return value

    @field_validator("prompts", "output", "model", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, Path) else value

    @field_validator("columns", mode="before")
    @classmethod
    def _columns_in_short(cls, value: Any) -> Any:
        return (pairs(value) or value) if isinstance(value, str) else value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for ours in value:
            if ours not in PROMPT_COLUMNS:
                raise ValueError(
                    f"{ours!r} is not a column of ours; {_meant(ours, PROMPT_COLUMNS)}ours are"
                    f" {', '.join(PROMPT_COLUMNS)}"
                )
        return value

    @field_validator("max_failed", mode="before")
    @classmethod
    def _count_or_share(cls, value: Any) -> Any:
        found = value
        with contextlib.suppress(ValueError):
            if isinstance(value, str) and value.endswith("%"):
                found = float(value[:-1]) / 100
            elif isinstance(value, str):
                found = int(value) if value.isdecimal() else float(value)
        if found is None or (type(found) is int and found >= 0) or (type(found) is float and 0 <= found <= 1):
            return found
        raise ValueError(
            "must be a count, as 100, or a share of the rows, as 5% or 0.05; a share is at most 1.0 or 100%"
        )

    @model_validator(mode="after")
    def _cards_agree(self) -> JobConfig:
        if self.max_cards is not None and self.cards != "all":
            raise ValueError(f"cards: {self.cards} and max_cards: {self.max_cards} contradict each other; name one")
        most = self.max_cards if self.cards == "all" else self.cards
        if most is not None and self.min_cards > most:
            raise ValueError(f"min_cards: {self.min_cards} is more than the job may have, which is {most}")
        return self

    @property
    def asks_for_cards(self) -> bool:
        """Whether the job may ask for cards that the cluster does not have."""
        return bool(self.min_cards or self.max_cards)

    @model_validator(mode="after")
    def _model_where_needed(self) -> JobConfig:
        if self.model is None and self.device != "simulated":
            raise ValueError("model: is missing; name a hub id, a directory or builtin:shapes")
        return self

    # The last of its kind, so that it is around the others.
    @model_validator(mode="wrap")
    @classmethod
    def _refused_in_our_words(cls, fields: Any, validated: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validated(fields)
        except ValidationError as error:
            # A value that is quoted may be a secret of the same job, which nobody has been told of.
            names = ("storage_options", "prompts_storage_options")
            options = {name: fields.get(name) for name in names} if isinstance(fields, Mapping) else {}
            raise InputError(redact(explain(error), options)) from None

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> JobConfig:
        """Reads a job from a YAML file, from overrides, or from both; overrides win.

        Args:
            path: YAML file whose top level is a mapping of the fields above.
            overrides: nested mapping of fields, merged into the file's.

        Raises:
            InputError: the file can't be read or a value breaks its rule; the message names each.
        """
        fields: dict[str, Any] = {}
        if path is not None:
            try:
                loaded = load_yaml(_read(path))
            except (OSError, UnicodeEncodeError) as error:
                said = getattr(error, "strerror", None) or error
                raise InputError(f"job file {str(path)!r} can't be read: {said}") from None
            except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
                # The error's own words quote the file, in which there may be a secret.
                mark = getattr(error, "problem_mark", None)
                where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
                raise InputError(f"job file {str(path)!r} is not YAML{where}") from None
            if not isinstance(loaded, dict):
                raise InputError(f"job file {str(path)!r} must hold a mapping of fields, such as 'seed: 0'")
            fields = loaded
        try:
            return cls.model_validate(merge(_in_full(fields), _in_full(overrides or {})))
        except RecursionError:
            raise InputError(f"job file {str(path)!r} is nested too deeply") from None


def _read(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        data = file.read(MAX_JOB_FILE + 1)
    if len(data) > MAX_JOB_FILE:
        raise ValueError("too large")
    return data.decode()


def _in_full(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job with mappings in place of short forms, so that they can be merged."""
    full = dict(fields)
    if isinstance(full.get("columns"), str) and (columns := pairs(full["columns"])) is not None:
        full["columns"] = columns
    for path, section in _sections().items():
        if isinstance(full.get(path), str) and hasattr(section, "short_for"):
            full[path] = {section.short_for: full[path]}
    return full


def _sections() -> dict[str, Any]:
    """The fields of a job that have fields of their own."""
    kinds = {path: field.annotation for path, field in JobConfig.model_fields.items()}
    return {path: kind for path, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


_PAIR = re.compile(r"\s*[\w.-]+\s*=")
_PAIR_ENDS = re.compile(rf",(?={_PAIR.pattern})")


def pairs(text: str, several: bool = True) -> dict[str, str] | None:
    """`prompt=caption,id=key` as a mapping; None if the text is something else.

    Args:
        text: what was given.
        several: whether a comma ends a pair where a name and = follow it; a secret may have such a comma.
    """
    parts = _PAIR_ENDS.split(text) if several else [text]
    if not all(_PAIR.match(part) for part in parts):
        return None
    return {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merges nested mappings; where both hold a value, `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def explain(error: ValidationError) -> str:
    """One line for all that is wrong with a job: each field, its value and its rule. Values of storage options,
    which may be secrets, are not shown."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        where = [str(part) for part in problem["loc"] if not str(part).startswith(("constrained-", "literal["))]
        where = [part for part in where if part not in ("int", "float", "str", "dict")]
        if problem["type"] == "extra_forbidden":
            where = [str(part) for part in problem["loc"]]  # a name of the user's may be one of these
        field = name(".".join(where))[:200] or "job"
        if problem["type"] == "extra_forbidden":
            said = "is not a field of a job"
            above = [str(part) for part in problem["loc"][:-1]]
            near = nearest(where[-1], (_sections()[above[0]] if above else JobConfig).model_fields)
            said += f"; did you mean {'.'.join([*above, near])}?" if near else ""
        elif problem["type"] == "missing":
            said = "is missing"
        else:
            said = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "model_type" and where:
                said = f"must be a mapping of {', '.join(_sections()[where[0]].model_fields)}"
            said = said[0].lower() + said[1:]
            if not where:
                lines.setdefault(said.split(":")[0], said)
                continue
            if "storage_options" not in field:
                said = f"{shown(problem['input'])}: {said}"
        lines[field] = f"{field}: {said}" if field not in lines else f"{lines[field]}, or {said.split(': ', 1)[-1]}"
    return "; ".join(lines.values())
