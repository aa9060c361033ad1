"""What the driver must know of a model before it starts a card: read from JSON files alone, without torch."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gaudi_batch.config.bounds import MAX_INT32
from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import GAUDI_FIELDS, check_gaudi_fields
from gaudi_batch.errors import HubUnreachable, InputError
from gaudi_batch.pipelines.families import FAMILIES, NOISY_SCHEDULERS, SIMULATED, Family
from gaudi_batch.pipelines.lora import LoraInfo, describe_loras
from gaudi_batch.pipelines.model_files import (
    PICKLED,
    WEIGHT_SUFFIXES,
    entries_of_model,
    files_of_model,
    read_json,
    weight_shapes,
)
from gaudi_batch.pipelines.signatures import family_of, lora_loader
from gaudi_batch.pipelines.simulated import DEFAULT_SIDE
from gaudi_batch.pipelines.trust import refuse_code
from gaudi_batch.redaction import redact
from gaudi_batch.storage.filesystem import expanded
from gaudi_batch.storage.listing import Entry
from gaudi_batch.storage.store import Storage
from gaudi_batch.storage.waits import told_if_slow
from gaudi_batch.text import one_line, short_repr

BUILTIN = "builtin:"
BUILTIN_MODELS = Path(__file__).resolve().parent.parent / "models"
NOT_LOOKED_AT = "not looked at, as the hub can't be reached from here"
GAUDI_CONFIG_FILE = "gaudi_config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
MAX_JSON = 32 * 1024**2
"""Bytes of a JSON file of a model; a tokenizer's has some millions."""
MAX_VAE_BLOCKS = 10
"""Most blocks of a VAE, each of which halves the sides; no model has as many."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelInfo:
    """A model, resolved."""

    name: str
    """The name in the job."""
    path: str
    """Directory or hub id."""
    hub: bool
    revision: str
    """The commit of a hub model, or the SHA-256 of a directory's files."""
    family: Family
    """What it has in common with others of its kind."""
    scheduler: str | None
    """The class of the scheduler to use, of diffusers or optimum-habana; None for the model's own."""
    width: int
    """The model's own width in pixels."""
    height: int
    use_safetensors: bool = True
    """Whether only safetensors are loaded. If not, libraries also take pickles where there are no safetensors, and read
    them with torch's `weights_only`."""
    storage: Storage | None = None
    """Where it lies, if that is a store."""
    files: Mapping[str, Entry] = field(default_factory=dict)
    """What it has there, by path."""
    loras: tuple[LoraInfo, ...] = ()
    """LoRAs that are fused into it."""
    looked_at: bool = True
    """False for a hub model of which nothing but its name is known."""

    @property
    def pipeline_class(self) -> str:
        """Its diffusers class, from model_index.json."""
        return self.family.pipeline_class if self.looked_at else NOT_LOOKED_AT


def describe_model(config: JobConfig) -> ModelInfo:
    """Finds a job's model and reads its properties.

    Raises:
        InputError: it can't be found, is of an unsupported class, has no safetensors, or its scheduler draws noise.
    """
    if config.device == "simulated":
        return ModelInfo("simulated", "", False, "", SIMULATED, None, DEFAULT_SIDE, DEFAULT_SIDE)
    name = config.model or ""
    if name.startswith(BUILTIN):
        directory = builtin_directory(name)
        if not (directory / "model_index.json").is_file():
            known = ", ".join(f"builtin:{path.parent.name}" for path in BUILTIN_MODELS.glob("*/model_index.json"))
            raise InputError(f"model {name!r} is not built in; built in: {known or 'none'}")
        return _describe(config, directory, None)
    if "://" in name:
        return _in_storage(config)
    directory = expanded(name)
    if directory.is_dir():
        if config.revision is not None:
            raise InputError(f"revision {config.revision!r}: model {name!r} is a directory; only hub models have one")
        return _describe(config, directory.resolve(), None)
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"model {name!r}: there is no such directory, and it is not a hub id such as 'owner/name'")
    snapshot = _from_hub("model", name, config.revision, "*.json")
    return _describe(config, snapshot, snapshot.name)


def _in_storage(config: JobConfig) -> ModelInfo:
    """A model in a store. Its JSON files are read, and it is known by what the store says of all its files."""
    name = redact(config.model or "")
    if config.revision is not None:
        raise InputError(f"revision {config.revision!r}: model {name!r} is in a store; only hub models have one")
    url = config.model or ""
    storage = Storage(url, config.options_for(url), config.storage_patience, read_only=True)
    files = entries_of_model(storage, config.use_safetensors)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        for path, entry in files.items():
            local = directory / path
            local.parent.mkdir(parents=True, exist_ok=True)
            # Of the others only their names count here.
            local.write_bytes((storage.get(path) or b"") if path.endswith(".json") and entry.size < MAX_JSON else b"")
        model = _describe(config, directory, None, storage)
    marks = "\0".join(f"{path}\0{entry.size}\0{entry.mark}" for path, entry in sorted(files.items()))
    revision = hashlib.sha256(marks.encode()).hexdigest()
    return replace(model, path="", revision=revision, storage=storage, files=files)


def builtin_directory(name: str) -> Path:
    """The directory of a model that comes with this package."""
    return BUILTIN_MODELS / name.removeprefix(BUILTIN)


def unseen_model(config: JobConfig, width: int, height: int) -> ModelInfo:
    """The model of a job that names a hub model which can't be looked at, and says itself how large its images are."""
    name = config.model or ""
    return ModelInfo(name, name, True, "not looked at", FAMILIES[0], config.scheduler, width, height, looked_at=False)


def _from_hub(what: str, name: str, revision: str | None, files: str) -> Path:
    """The folder, named after its commit, of a hub model's fetched or cached files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    at = f" at revision {revision!r}" if revision else ""
    try:
        with told_if_slow(lambda: f"{what} {name!r}{at}: still asking the hub for it"):
            return Path(snapshot_download(name, revision=revision, allow_patterns=[files]))
    except LocalEntryNotFoundError:
        raise HubUnreachable(
            f"{what} {name!r}{at}: no such directory here, the hub can't be reached, and its cache has none; download"
            f" it where there is a network (hf download {name}), or name a directory"
        ) from None
    except Exception as error:
        raise InputError(
            f"{what} {name!r}{at}: no such directory here, and the hub gives none: {one_line(error)}"
        ) from None


def _describe(config: JobConfig, directory: Path, commit: str | None, storage: Storage | None = None) -> ModelInfo:
    name = config.model or ""
    index = read_json(f"model {name!r}", directory, "model_index.json")
    pipeline_class = index.get("_class_name")
    family = next((family for family in FAMILIES if _is_of(family, name, directory, pipeline_class)), None)
    is_lazy = config.device == "hpu" and config.gaudi.mode == "lazy"
    if family is None and not is_lazy and isinstance(pipeline_class, str):
        family = family_of(pipeline_class, {part: value for part, value in index.items() if value != [None, None]})
    if family is None:
        raise _unsupported(f"model {name!r} is a {one_line(pipeline_class, 100)}", is_lazy)
    loader = lora_loader(family.pipeline_class) if config.lora else None
    if loader is not None and not loader.components:
        raise InputError(f"lora: model {name!r} is a {family.pipeline_class}, of which diffusers loads no LoRA")
    refuse_code(name, directory)
    _require_weights(config, directory, commit, index)
    if family.denoiser == "transformer" and (family.is_known or (directory / SCHEDULER_CONFIG).is_file()):
        _refuse_noise(name, directory)
    width, height = _native_size(name, directory, family)
    return ModelInfo(
        name=name,
        path=name if commit else str(directory),
        hub=commit is not None,
        revision=commit or digest(directory, config.use_safetensors),
        family=family,
        scheduler=_scheduler(config, family),
        width=width,
        height=height,
        use_safetensors=config.use_safetensors,
        loras=describe_loras(config, loader, weight_shapes(name, directory, commit, storage)) if config.lora else (),
    )


def _unsupported(what: str, is_lazy: bool) -> InputError:
    known = ", ".join(dict.fromkeys(family.pipeline_class for family in FAMILIES))
    if is_lazy:
        return InputError(
            f"{what}; supported: {known}, and with --gaudi.mode compile or eager all text-to-image classes of diffusers"
        )
    return InputError(
        f"{what}, which is no class of the diffusers that is installed here or makes no images from texts alone;"
        f" supported: {known}, and its other text-to-image classes"
    )


def _cached_as(directory: Path) -> list[str]:
    """The name of a hub model's folder in the hub's cache, if the directory is in one."""
    return [part for part in directory.parts if part.startswith("models--")]


def _is_of(family: Family, name: str, directory: Path, pipeline_class: Any) -> bool:
    if family.pipeline_class != pipeline_class:
        return False
    if family.mark is None:
        return True
    names = [name.rsplit("/", 1)[-1], directory.name, *_cached_as(directory)]
    if not any(family.mark.name in each for each in names):
        return False
    content = read_json(f"model {name!r}", directory, family.mark.file)
    return all(content.get(field) == value for field, value in family.mark.fields.items())


def _native_size(name: str, directory: Path, family: Family) -> tuple[int, int]:
    """Width and height in pixels that a model was made for; 0 where a class that is not in the table says nothing."""
    wanted = ["vae/config.json", *([family.size_from] if family.size_from else [])]
    if not family.is_known and not all((directory / file).is_file() for file in wanted):
        return 0, 0
    vae = read_json(f"model {name!r}", directory, wanted[0])
    blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [1, 1, 1, 1]
    sample = family.latents
    if family.size_from:
        sample = read_json(f"model {name!r}", directory, family.size_from).get("sample_size") or sample
    height, width = sample if isinstance(sample, list) and len(sample) == 2 else (sample, sample)
    if not isinstance(blocks, list) or len(blocks) > MAX_VAE_BLOCKS:
        raise InputError(
            f"model {name!r}: block_out_channels of its vae is {short_repr(blocks)}; it must be a short list"
        )
    for side in (width, height):
        if not isinstance(side, int) or not 1 <= side <= MAX_INT32 >> MAX_VAE_BLOCKS:
            raise InputError(
                f"model {name!r}: sample_size of its {family.denoiser} is {short_repr(sample)}; it must be one or two"
                " sizes"
            )
    return width << len(blocks) - 1, height << len(blocks) - 1


def _scheduler(config: JobConfig, family: Family) -> str | None:
    on_hpu = config.device == "hpu" and config.gaudi.mode == "lazy"
    known = family.gaudi_schedulers if on_hpu else family.schedulers
    if not family.is_known:
        if config.scheduler is not None:
            raise InputError(f"scheduler {config.scheduler!r}: a {family.name} keeps its own; leave scheduler out")
        return None
    name = config.scheduler or next(iter(known))
    if name in known:
        return known[name]
    choose = f"use one of {', '.join(known)}" if len(known) > 1 else f"use {next(iter(known))}"
    if name in NOISY_SCHEDULERS or (on_hpu and name in family.schedulers and name == "euler"):
        raise InputError(
            f"scheduler {name!r} draws noise while it steps, from one generator for the whole batch, so an image would"
            f" depend on its neighbours; {choose}"
        )
    raise InputError(f"scheduler {name!r} is not known for device {config.device}; {choose}")


def _refuse_noise(name: str, directory: Path) -> None:
    if read_json(f"model {name!r}", directory, SCHEDULER_CONFIG).get("stochastic_sampling"):
        raise InputError(
            f"model {name!r}: its scheduler has stochastic_sampling, which draws noise for a whole batch, so an image"
            " would depend on its neighbours; set it to false in a copy of the model"
        )


def _require_weights(config: JobConfig, directory: Path, commit: str | None, index: Mapping[str, Any]) -> None:
    name = config.model or ""
    wanted = (".safetensors",) if config.use_safetensors else (".safetensors", PICKLED)
    files, all_of_them = files_of_model(name, directory, commit)
    for component, value in index.items():
        if not isinstance(value, list) or value[0] is None or f"{component}/config.json" not in files:
            continue
        own_files = [file for file in files if file.startswith(f"{component}/")]
        if any(file.endswith(wanted) for file in own_files):
            continue
        if any(file.endswith(PICKLED) for file in own_files):
            raise InputError(
                f"model {name!r}: its {component} has no .safetensors but weights that Python has pickled;"
                " use_safetensors: false takes those, too"
            )
        if all_of_them:
            raise InputError(f"model {name!r}: its {component} has no {' and no '.join(wanted)}")


def read_gaudi_config(source: Mapping[str, Any] | str) -> dict[str, Any]:
    """A Gaudi config as a mapping of the fields that count, read from a mapping, a path or a hub id.

    Raises:
        InputError: it can't be found or read.
    """
    if not isinstance(source, str):
        return dict(source)
    path = expanded(source)
    if path.is_dir():
        path = path / GAUDI_CONFIG_FILE
    elif not path.exists():
        if not _HUB_ID.fullmatch(source):
            raise InputError(f"gaudi.config {source!r}: there is no such file, and it is not a hub id as 'owner/name'")
        path = _from_hub("gaudi.config", source, None, GAUDI_CONFIG_FILE) / GAUDI_CONFIG_FILE
    fields = read_json(f"gaudi.config {source!r}", path.parent, path.name)
    # Configs on the hub also have fields of older releases, which optimum-habana ignores.
    known = {name: value for name, value in fields.items() if name in GAUDI_FIELDS}
    try:
        check_gaudi_fields(known)
    except ValueError as error:
        raise InputError(f"gaudi.config {source!r}: {error}") from None
    return known


def digest(directory: Path, use_safetensors: bool) -> str:
    """The SHA-256, in hexadecimal digits, of the names and contents of a directory's files that may shape an image."""
    hasher = hashlib.sha256()
    suffixes = WEIGHT_SUFFIXES if use_safetensors else WEIGHT_SUFFIXES | {PICKLED}
    for path in sorted(directory.rglob("*")):
        if path.suffix in suffixes and path.is_file():
            hasher.update(f"{path.relative_to(directory).as_posix()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    hasher.update(chunk)
    return hasher.hexdigest()
