"""The LoRAs of a job, as the driver must know them before it starts a card: where they lie, and whether they fit the
model. Only headers of safetensors files are read for that, and nothing of torch."""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import LoraConfig
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.pipelines.safetensors_files import Shapes, read_shapes
from gaudi_batch.pipelines.signatures import LoraLoader
from gaudi_batch.redaction import redact
from gaudi_batch.storage.disk import write_whole
from gaudi_batch.storage.filesystem import expanded
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

SUFFIX = ".safetensors"
DENOISERS = ("transformer", "unet")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_FIRST = re.compile(
    r"(?P<module>.+?)(?P<kind>\.lora_A(\.\w+)?|[._]lora(_linear_layer)?\.down|\.lora_down|\.down)\.weight"
)
"""The first of the two matrices that change a weight, in the forms that diffusers, peft and kohya's scripts write."""
_KOHYA = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
"""Prefixes of kohya's names; `lora_unet_` is the denoiser, whatever it is."""
_SCRIPTS = (*_KOHYA, "lora_unet_")
"""What names of other scripts begin with that diffusers converts (`lora_conversion_utils.py` of 0.35)."""
_SCRIPTS_OF_TRANSFORMERS = (
    "lora_transformer_",
    "diffusion_model.",
    "double_blocks",
    "single_blocks",
    "transformer_blocks.",
    "base_model.model.",
    "text_encoders.",
)
"""The same for models whose denoiser is a transformer."""
_NOT_READ = re.compile(r"dora_scale$|lora_mid\.weight$|\.diff(_b)?$|\.hada_|\.lokr_")
"""Parts of DoRA, LoCon and LyCORIS in the form of kohya's scripts."""
_OF_TEXT_ENCODERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What older releases of diffusers called the layers of text encoders."""


@dataclass(frozen=True)
class LoraInfo:
    """A LoRA, resolved."""

    name: str
    """Its path in the job."""
    weight_name: str
    """Its file."""
    scale: float
    revision: str
    """The commit of a hub's repository, or the file's SHA-256."""
    directory: str | None = None
    """Where the file lies, if that is on a file system."""
    storage: Storage | None = None
    """The store's directory that it lies in, if it does."""

    @property
    def hub(self) -> bool:
        """Whether it is on a hub."""
        return self.directory is None and self.storage is None

    def describe(self) -> dict[str, Any]:
        """What decides images."""
        return {"path": self.name, "weight_name": self.weight_name, "revision": self.revision, "scale": self.scale}


class Change(NamedTuple):
    """A weight that a LoRA changes."""

    module: str
    inputs: int
    outputs: int


def describe_loras(
    config: JobConfig, loader: LoraLoader | None, weights: Mapping[str, Shapes | None]
) -> tuple[LoraInfo, ...]:
    """Finds a job's LoRAs, and makes sure that they fit its model.

    Args:
        config: the job.
        loader: how the model's class loads them; None if that is not known here.
        weights: the model's components and the shapes of their weights; None for those that can't be had here.

    Raises:
        InputError: one can't be found, is no safetensors file or does not fit.
        StorageError: storage failed.
    """
    infos = []
    for lora in config.lora:
        info, shapes = _find(config, lora)
        try:
            changes = list(_changes(shapes))
        except ValueError as error:
            raise InputError(f"lora {info.name!r}: {info.weight_name}: {error}") from None
        if not changes:
            raise InputError(f"lora {info.name!r}: {info.weight_name} has no weights of a LoRA")
        _refuse_unread(config, info, changes, loader or LoraLoader((*DENOISERS, *TEXT_ENCODERS), True), weights)
        _refuse_misfit(config, info, changes, weights)
        infos.append(info)
    return tuple(infos)


def _find(config: JobConfig, lora: LoraConfig) -> tuple[LoraInfo, Shapes]:
    if "://" in lora.path:
        return _in_storage(config, lora)
    path = expanded(lora.path)
    if path.exists():
        if lora.revision is not None:
            raise InputError(f"lora {lora.path!r}: revision {lora.revision!r} is of the hub, and this is a path")
        if path.is_file() and lora.weight_name not in (None, path.name):
            raise InputError(f"lora {lora.path!r} is a file, and weight_name is {lora.weight_name!r}; leave one out")
        directory = path if path.is_dir() else path.parent
        name = lora.weight_name if path.is_dir() else path.name
        name = _only(lora, name, [file.name for file in directory.glob(f"*{SUFFIX}")])
        return _described(lora, name, directory / name, directory=str(directory.resolve()))
    if lora.path.startswith((".", "/", "~")):
        raise InputError(f"lora {lora.path!r}: there is no such file or directory on this machine")
    return _on_hub(lora)


def _only(lora: LoraConfig, name: str | None, names: list[str]) -> str:
    """The name of the file: the one that the job names, or the only one there is."""
    if name is None and len(names) != 1:
        if not names:
            raise InputError(f"lora {lora.path!r} has no {SUFFIX} file")
        raise InputError(f"lora {lora.path!r} has {', '.join(sorted(names)[:10])}; name one by weight_name")
    name = name or names[0]
    if not name.endswith(SUFFIX):
        raise InputError(f"lora {lora.path!r}: {name!r} is not a {SUFFIX} file, and other files may hold code")
    if names and name not in names:
        raise InputError(f"lora {lora.path!r} has no {name!r}; it has {', '.join(sorted(names)[:10])}")
    return name


def _described(lora: LoraConfig, name: str, file: Path, **where: Any) -> tuple[LoraInfo, Shapes]:
    try:
        with file.open("rb") as opened:

            def read(start: int, stop: int) -> bytes:
                opened.seek(start)
                return opened.read(stop - start)

            shapes = read_shapes(read)
        revision = _sha256(file)
    except (OSError, ValueError) as error:
        raise InputError(f"lora {lora.path!r}: {name} can't be read: {one_line(error)}") from None
    return LoraInfo(lora.path, name, lora.scale, revision, **where), shapes


def _sha256(file: Path) -> str:
    hasher = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _in_storage(config: JobConfig, lora: LoraConfig) -> tuple[LoraInfo, Shapes]:
    """A LoRA in a store: its object, or the only one in a directory."""
    path = redact(lora.path)
    url, _, name = lora.path.rstrip("/").rpartition("/")
    if not name.endswith(SUFFIX):
        url, name = lora.path, ""
    options = config.options_for(url)
    storage = Storage(url, options, config.storage_patience, read_only=True)
    name = _only(lora, name or lora.weight_name, [] if name else _files_in(storage))
    data = storage.get(name)
    if data is None:
        raise InputError(f"lora {path!r}: there is no {name} in {storage.url}")
    try:
        shapes = read_shapes(lambda start, stop: data[start:stop])
    except ValueError as error:
        raise InputError(f"lora {path!r}: {name} can't be read: {error}") from None
    return LoraInfo(path, name, lora.scale, hashlib.sha256(data).hexdigest(), storage=storage), shapes


def _files_in(storage: Storage) -> list[str]:
    return [name for name in storage.names("") if name.endswith(SUFFIX)]


def _on_hub(lora: LoraConfig) -> tuple[LoraInfo, Shapes]:
    from huggingface_hub import hf_hub_download, model_info
    from huggingface_hub.errors import LocalEntryNotFoundError

    at = f" at revision {lora.revision!r}" if lora.revision else ""
    try:
        if lora.weight_name is None:
            files = [file.rfilename for file in model_info(lora.path, revision=lora.revision).siblings or ()]
            name = _only(lora, None, [file for file in files if file.endswith(SUFFIX)])
        else:
            name = _only(lora, lora.weight_name, [])
        file = Path(hf_hub_download(lora.path, name, revision=lora.revision))
    except InputError:
        raise
    except LocalEntryNotFoundError:
        raise InputError(
            f"lora {lora.path!r}{at}: no such path here, the hub can't be reached, and its cache does not have it;"
            f" download it where there is a network (hf download {lora.path}), or name a path"
        ) from None
    except Exception as error:
        raise InputError(
            f"lora {lora.path!r}{at}: no such path here, and the hub gives none: {one_line(error)}"
        ) from None
    info, shapes = _described(lora, name, file)
    commit = next(part for part in file.parts[::-1] if re.fullmatch(r"[0-9a-f]{40}", part))
    return LoraInfo(info.name, name, info.scale, commit), shapes


def _changes(shapes: Shapes) -> Iterator[Change]:
    """The weights that it changes. Raises ValueError if the two matrices for one of them don't go together."""
    for name, first in shapes.items():
        if _NOT_READ.search(name):
            raise ValueError(f"{name} is of a kind that diffusers does not read, or passes over")
        if (match := _FIRST.fullmatch(name)) is None:
            continue
        kind = match["kind"].replace("lora_A", "lora_B").replace("down", "up")
        second = shapes.get(f"{match['module']}{kind}.weight", ())
        if min(len(first), len(second)) < 2 or first[0] != second[1]:
            raise ValueError(
                f"{name} is of {' x '.join(map(str, first))} values, and what it goes with of"
                f" {' x '.join(map(str, second)) or 'none'}"
            )
        yield Change(match["module"].replace(".processor.", "."), first[1], second[0])


def _refuse_unread(
    config: JobConfig,
    info: LoraInfo,
    changes: list[Change],
    loader: LoraLoader,
    weights: Mapping[str, Shapes | None],
) -> None:
    """Refuses names that diffusers would pass over."""
    components = tuple(f"{name}." for name in loader.components)
    others = (*_SCRIPTS, *(_SCRIPTS_OF_TRANSFORMERS if "transformer" in weights else ()))
    read = (*components, *(others if loader.converts else ()))
    for change in changes:
        if not change.module.startswith(read):
            raise InputError(
                f"lora {info.name!r} does not fit model {config.model!r}: diffusers does not read names such as"
                f" {change.module} for its class; those that it reads begin with {', '.join(read)}"
            )


def _refuse_misfit(
    config: JobConfig, info: LoraInfo, changes: list[Change], weights: Mapping[str, Shapes | None]
) -> None:
    denoiser = next((name for name in DENOISERS if name in weights), DENOISERS[0])
    for change in changes:
        component, _, rest = change.module.partition(".")
        is_exact = component in (*DENOISERS, *TEXT_ENCODERS)
        if not is_exact:
            component = next((part for mark, part in _KOHYA.items() if change.module.startswith(mark)), denoiser)
        shapes = weights.get(component, {})
        if shapes is None:
            continue
        if not (_fits_exactly(rest, change, shapes) if is_exact else _fits_by_shape(change, shapes)):
            raise InputError(
                f"lora {info.name!r} does not fit model {config.model!r}: it changes {change.module}, which takes"
                f" {change.inputs} values and gives {change.outputs}, and the model's {component} has no such weight;"
                " take the LoRA's own base model, or leave it out"
            )


def _fits_exactly(module: str, change: Change, weights: Shapes) -> bool:
    place, _, layer = module.rpartition(".")
    older = f"{place}.{_OF_TEXT_ENCODERS[layer]}" if layer in _OF_TEXT_ENCODERS else module
    for name in (module, f"{module}.0", older):  # `to_out` is a list, which older files pass over
        shape = weights.get(f"{name}.weight", ())
        if len(shape) > 1 and (shape[1], shape[0]) == (change.inputs, change.outputs):
            return True
    return False


def _fits_by_shape(change: Change, weights: Shapes) -> bool:
    """Whether there is a weight of such a shape. Other scripts have names of their own, and some take several weights
    with the same input for one."""
    shapes = [shape for shape in weights.values() if len(shape) > 1 and shape[1] == change.inputs]
    return any(change.outputs % shape[0] == 0 for shape in shapes)


def fetch_lora(info: LoraInfo, cache: Path) -> Path:
    """The file of a LoRA on this node, fetched if need be.

    Args:
        info: the LoRA.
        cache: a directory on the node's disk for those from a store.

    Raises:
        InputError: it is another file than the driver saw.
        StorageError: storage failed.
    """
    if info.directory is not None:
        file = Path(info.directory, info.weight_name)
        if not file.is_file():
            raise InputError(
                f"lora {info.name!r}: this node has no {file}; a local path must be on a file system that all nodes"
                " share"
            )
        if _sha256(file) != info.revision:
            raise InputError(f"lora {info.name!r}: {file} is not what the driver saw when the job began")
        return file
    if info.storage is None:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(info.name, info.weight_name, revision=info.revision))
    file = cache / f"{info.revision}{SUFFIX}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{info.revision}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the node's other cards wait for the one that fetches it
        if not file.exists():
            data = info.storage.get(info.weight_name)
            if data is None:
                raise StorageError(f"lora {info.name!r}: {info.weight_name} is not there any more")
            if hashlib.sha256(data).hexdigest() != info.revision:
                raise InputError(f"lora {info.name!r}: {info.weight_name} is not what it was when the job began")
            write_whole(file, lambda part: Path(part).write_bytes(data), lambda: True, create=False)
    return file
