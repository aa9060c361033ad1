"""What a job is: one immutable `JobConfig`, read from YAML, flags or Python and validated once.

Every field is declared here alone: its type, its default, its rule and the sentence that explains it. The command
line makes its flags and their help from these declarations.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from gaudi_batch.config.bounds import MAX_IMAGES, MAX_SEED
from gaudi_batch.config.deadline import parse_deadline
from gaudi_batch.config.load import explain, in_full, merge, pairs, read_job_file
from gaudi_batch.config.sections import (
    CpuConfig,
    EncodingConfig,
    GaudiSettings,
    LimitsConfig,
    LoraConfig,
    OnEndConfig,
    PositiveInt,
    Section,
    SimulatedConfig,
)
from gaudi_batch.errors import InputError
from gaudi_batch.redaction import redact, redacted_options
from gaudi_batch.text import did_you_mean

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


Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class JobConfig(Section):
    """A text-to-image job: which prompts, which model, which cards, where the images go.

    Its `repr` and `str` have `***` in place of what is secret; its fields and `model_dump` are as they were given.

        >>> from gaudi_batch import JobConfig
        >>> job = JobConfig(prompts="prompts.parquet", output="out", device="simulated", steps=20)
        >>> job.steps, job.batch_size
        (20, 8)
        >>> JobConfig.load("job.yaml", {"steps": 30}).steps
        30

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
    """Hub id, directory or URL (S3, Google Cloud Storage, Azure) of the model, or builtin:shapes; the simulated device
    needs none."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    use_safetensors: bool = True
    """Whether only safetensors are loaded; false takes pickled weights (.bin), too, of a component that has no
    others. They are read with torch's weights_only, which runs no code of theirs."""

    lora: tuple[LoraConfig, ...] = ()
    """LoRAs that are fused into the model, as [{path, weight_name, scale, revision}]; all rows of the job have them."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the dataset's columns where they are others, as {name: column} or name=column,name=column; a name is
    one of prompt, id, negative_prompt, seed, width, height, steps, guidance_scale, num_images."""

    carry: list[str] | None = None
    """Columns of the dataset that the manifests carry beside those of the job, as a list or as column,column; * is
    every one. Null is every one but binary columns and nested ones of over 256 bytes a row; the log names these."""

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

    steps: PositiveInt | None = None
    """Denoising steps; null is what models of this kind are made for, 50 for Stable Diffusion 1 and 2."""

    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Classifier-free guidance; 1 or less turns it off. Null is what models of this kind are made for, 7.5 for Stable
    Diffusion 1 and 2."""

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
    """Scheduler by name; null is ddim for Stable Diffusion 1 and 2, euler for XL, flow_match_euler for the others."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type that the model computes in; null is float32 on the cpu. On hpu it is as the Gaudi config says for Stable
    Diffusion 1 and 2, and bfloat16 for the others."""

    format: Literal["files", "webdataset", "parquet"] = "files"
    """How images are kept: files, one object an image; webdataset, a tar file a shard; parquet, a table a shard with a
    column of images."""

    encoding: EncodingConfig = Field(default_factory=EncodingConfig)
    """How an image becomes bytes."""

    shard_size: PositiveInt | None = None
    """Prompts in a shard, the unit of dispatch and of commit; null follows the images, the batch size and the cards."""

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

    price_per_card_hour: Price | None = None
    """What an hour of a card costs, in any currency. A card is paid for from when the cluster gives it until the run
    gives it back."""

    price_per_node_hour: Price | None = None
    """What an hour of a node costs, in place of the price of a card. A node is paid for while the run has a card of
    it."""

    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """What the whole run may cost, by the price: then it begins no more work and commits what has begun."""

    deadline: str | None = None
    """When the run begins no more work and commits what has begun: a time with its zone, as 2026-12-01T08:00:00+01:00,
    or the time that this command may take, as 8h, 90m or 1h30m."""

    on_end: tuple[OnEndConfig, ...] = ()
    """Who is told that the run is over: a webhook's URL, a command, or a list of {url, format: json or slack} and
    {command}. ${NAME} in a URL is a variable of the driver's environment."""

    cpu: CpuConfig = Field(default_factory=CpuConfig)
    """Settings of device cpu."""

    gaudi: GaudiSettings = Field(default_factory=GaudiSettings)
    """Settings of device hpu."""

    simulated: SimulatedConfig = Field(default_factory=SimulatedConfig)
    """Settings of device simulated."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for field, value in super().__repr_args__():
            name = field or ""
            yield field, redacted_options({name: value})[name]

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

    @field_validator("carry", mode="before")
    @classmethod
    def _carry_in_short(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        with contextlib.suppress(ValueError):
            if isinstance(names := json.loads(value), list):  # as a name with a comma needs it
                return names
        return [name.strip() for name in value.split(",") if name.strip()]

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, value: dict[str, str]) -> dict[str, str]:
        for column in value:
            if column not in PROMPT_COLUMNS:
                raise ValueError(
                    f"{column!r} is no column that a job knows; {did_you_mean(column, PROMPT_COLUMNS)}it knows"
                    f" {', '.join(PROMPT_COLUMNS)}"
                )
        return value

    @field_validator("max_failed", mode="before")
    @classmethod
    def _count_or_share(cls, value: Any) -> Any:
        number = value
        with contextlib.suppress(ValueError):
            if isinstance(value, str) and value.endswith("%"):
                number = float(value[:-1]) / 100
            elif isinstance(value, str):
                number = int(value) if value.isdecimal() else float(value)
        if number is None or (type(number) is int and number >= 0) or (type(number) is float and 0 <= number <= 1):
            return number
        raise ValueError(
            "must be a count, as 100, or a share of the rows, as 5% or 0.05; a share is at most 1.0 or 100%"
        )

    @field_validator("deadline", mode="before")
    @classmethod
    def _deadline_as_text(cls, value: Any) -> Any:
        if isinstance(value, datetime):  # as YAML reads a time
            return value.isoformat()
        return value if value is None else str(value)

    @field_validator("deadline")
    @classmethod
    def _deadline_is_clear(cls, value: str | None) -> str | None:
        if value is not None:
            parse_deadline(value)
        return value

    @field_validator("on_end", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, (str, Mapping, OnEndConfig)) else value

    @model_validator(mode="after")
    def _price_is_known(self) -> JobConfig:
        prices = [price for price in (self.price_per_card_hour, self.price_per_node_hour) if price is not None]
        if len(prices) > 1:
            raise ValueError("price_per_card_hour: is one price and price_per_node_hour another; name one of them")
        if self.budget is not None and not prices:
            raise ValueError(
                f"budget: {self.budget:g} is reached when the run has cost that; name price_per_card_hour or"
                " price_per_node_hour, too"
            )
        return self

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

    def options_for(self, url: str) -> dict[str, Any]:
        """Fsspec options of a place that has none of its own: the output's, if both are on one protocol."""
        protocol, is_url, _ = url.partition("://")
        return self.storage_options if is_url and self.output.startswith(f"{protocol}://") else {}

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
            names = ("storage_options", "prompts_storage_options", "on_end")
            options = {name: fields.get(name) for name in names} if isinstance(fields, Mapping) else {}
            raise InputError(redact(explain(error, cls), options)) from None

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> JobConfig:
        """Reads a job from a YAML file, from overrides, or from both; overrides win.

        Args:
            path: YAML file whose top level is a mapping of the fields above.
            overrides: nested mapping of fields, merged into the file's.

        Raises:
            InputError: the file can't be read or a value breaks its rule; the message names each.
        """
        fields = {} if path is None else read_job_file(path)
        try:
            return cls.model_validate(merge(in_full(fields, cls), in_full(overrides or {}, cls)))
        except RecursionError:
            raise InputError(f"job file {str(path)!r} is nested too deeply") from None
