"""The parts of a job that have fields of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from gaudi_batch.text import did_you_mean

OUTPUT = "output"
"""The place of recipes that is the run's own output."""
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


OF_LAZY_MODE = ("config", "hpu_graphs", "fused_attention", "quantize")
"""Fields of `gaudi` that mean something to optimum-habana alone."""
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


class LoraConfig(Section):
    """A LoRA that is fused into the model before the first image."""

    path: str
    """Directory, .safetensors file, hub id or URL of S3, Google Cloud Storage or Azure."""

    weight_name: str | None = None
    """The file, where there are several; safetensors alone are read."""

    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """How much of it is added; 0 adds nothing."""

    revision: str | None = None
    """Branch, tag or commit of a hub's repository."""

    @field_validator("path")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a directory, a file, a hub id or a URL")
        return value


class CpuConfig(Section):
    """Settings of `device: cpu`."""

    threads: PositiveInt | None = None
    """Threads of one card. Null on the cpu is its share of the CPUs that the driver may use (affinity, cgroup), fixed
    in run.json as the run begins; null on hpu is the card's share of those that its own node may use."""


class QuantizeConfig(Section):
    """Eight-bit floats by Intel Neural Compressor, in optimum-habana's pipelines that know them."""

    config: str
    """Path of its JSON configuration, where each node sees it; `QUANT_CONFIG` of Intel's documentation."""

    mode: Literal["measure", "quantize"]
    """`measure` takes the scales in each card's first batch and writes them where the configuration says; `quantize`
    uses them. Scales belong to one model and one generation of cards."""


class GaudiSettings(Section):
    """Settings of `device: hpu`."""

    mode: Literal["lazy", "compile", "eager"] = "lazy"
    """How images are made: `lazy` by optimum-habana's pipelines in lazy mode; `compile` and `eager` by diffusers' own
    in eager mode, without optimum-habana, the denoiser compiled by torch.compile or not."""

    config: dict[str, Any] | str = Field(default_factory=lambda: {"use_torch_autocast": True})
    """Gaudi config of optimum-habana: fields, or a hub id or path of a gaudi_config.json."""

    hpu_graphs: bool = True
    """Whether to capture the UNet as an HPU graph and replay it."""

    fused_attention: bool | None = None
    """Whether the UNet's attention is Intel's fused kernel; if so, other attention may reduce in bfloat16, too. Null is
    true for a new run, and for one that is resumed what it began with; an older version began runs without."""

    quantize: QuantizeConfig | None = None
    """Eight-bit floats, as {config: PATH, mode: measure or quantize}, for Stable Diffusion 3, FLUX and Qwen-Image."""

    max_graphs: PositiveInt = 16
    """Graph keys whose graphs a card keeps; for one more the least recently used is given up, or all, as docs/gaudi.md
    says of each model."""

    recipe_cache: str | None = "${HOME}/.cache/gaudi-batch/recipes"
    """Directory on each node's own disk for compiled recipes, which its cards share; null keeps none."""

    recipe_cache_mb: PositiveInt = 16384
    """Size of that directory in MB, beyond which the oldest recipes are removed."""

    recipe_store: str | None = OUTPUT
    """Where recipes are kept for other nodes, which then need not compile: `output` is the directory `recipes` of the
    run's output, a URL or an absolute path a directory that runs share; null keeps them on their node alone."""

    def shaping(self) -> dict[str, Any]:
        """The fields that decide what a batch is and how long it takes."""
        if self.mode != "lazy":
            return {"mode": self.mode}
        fields = {"config", "hpu_graphs"} | ({"quantize"} if self.quantize else set())
        return self.model_dump(mode="json", include=fields)

    @model_validator(mode="after")
    def _of_mode(self) -> GaudiSettings:
        if self.mode != "lazy":
            for name in OF_LAZY_MODE:
                default = type(self).model_fields[name].get_default(call_default_factory=True)
                if getattr(self, name) != default:
                    raise ValueError(f"{name} is a setting of mode lazy; with mode {self.mode} leave it out")
        return self

    @field_validator("recipe_store")
    @classmethod
    def _output_or_place(cls, value: str | None) -> str | None:
        if value not in (None, OUTPUT) and "://" not in value and not value.startswith(("/", "~")):
            raise ValueError(f"must be {OUTPUT}, a URL, an absolute path or null")
        return value

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

    slow_modules: tuple[int, ...] = ()
    """Modules on which a batch takes `slow_factor` times as long."""

    slow_factor: Annotated[float, Field(ge=1)] = 2.0
    """How many times as long."""

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


VARIABLE = re.compile(r"\$\{(\w+)\}")
"""A variable of the driver's environment in a URL."""
_URL_IN_TEXT = re.compile(r"\w+://[^\s'\"]+", re.IGNORECASE)
_TOKEN = re.compile(
    r"(?=[A-Za-z]*\d)[A-Za-z\d]{20,}|[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}|authorization", re.IGNORECASE
)
"""What tokens look like: long words with a digit, UUIDs, and what stands behind the name of a header."""
_VARIABLE_ALONE = re.compile(r"\"?\$(\w+|\{\w+\})\"?")


def check_webhook(url: str) -> None:
    """Raises a ValueError, which does not show the URL, if nothing can be sent to it."""
    try:
        parts = urlsplit(url)
        sendable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sendable = False
    if not sendable or not url.isprintable() or " " in url:
        raise ValueError("must be a URL that begins with http:// or https:// and has a host")
    if "@" in parts.netloc:
        raise ValueError("has a user name or a password before its host, which are not sent; use a command")


class OnEndConfig(Section):
    """Who is told that a run is over."""

    takes_text: ClassVar[bool] = True
    """Whether a flag takes a text in place of the mapping, as it is."""

    url: Annotated[str | None, Field(repr=False)] = None
    """Where JSON is posted; ${NAME} in it is a variable of the driver's environment."""

    format: Literal["json", "slack"] | None = None
    """What is posted to the URL: json, the outcome by fields; slack, sentences in the form that Slack takes. Null is
    slack for hooks.slack.com and json for others."""

    command: Annotated[str | None, Field(repr=False)] = None
    """What the shell runs on the driver's machine, with that JSON on standard input."""

    @property
    def tells_url(self) -> bool:
        """Whether whoever reads it may learn a URL or a token from it: all but a URL that is a variable, and a command
        without either."""
        if self.url is not None:
            return VARIABLE.fullmatch(self.url) is None
        command = self.command or ""
        return "://" in command or _TOKEN.search(command) is not None

    @property
    def urls(self) -> list[str]:
        """The http(s) URLs in it."""
        return _URL_IN_TEXT.findall(self.url or self.command or "")

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        if isinstance(value, str):
            is_url = value.lstrip().lower().startswith(("http://", "https://")) or VARIABLE.fullmatch(value.strip())
            return {"url": value.strip()} if is_url else {"command": value}
        if isinstance(value, Mapping) and any("://" in str(name) for name in value):
            raise ValueError("must be a text, or a mapping of url and format, or of command")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> OnEndConfig:
        if (self.url is None) == (self.command is None):
            raise ValueError("must have either a url or a command")
        if self.command is not None and (not self.command.strip() or "\0" in self.command):
            raise ValueError("command must be what a shell can run")
        if self.command is not None and _VARIABLE_ALONE.fullmatch(self.command.strip()):
            raise ValueError("command is nothing but a variable; a URL in one is written ${NAME}, as a url")
        if self.command is not None and self.format is not None:
            raise ValueError("format belongs to a url; a command gets the JSON on standard input")
        if self.url is not None and not VARIABLE.search(self.url):
            check_webhook(self.url)
        return self
