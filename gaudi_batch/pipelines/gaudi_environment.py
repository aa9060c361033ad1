"""The environment of a card's process, which must be set before Intel's stack is imported. The driver imports this
module, too; it needs no torch."""

from __future__ import annotations

import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import OUTPUT, QuantizeConfig
from gaudi_batch.layout import RECIPES
from gaudi_batch.pipelines.recipes import Recipes, place_of
from gaudi_batch.storage.store import Storage

_RECIPE_CACHE = "PT_HPU_RECIPE_CACHE_CONFIG"
_OP_LISTS = {
    "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST": "autocast_bf16_ops",
    "PT_HPU_AUTOCAST_FP32_OPS_LIST": "autocast_fp32_ops",
}
"""Variables of the bridge that name files of operations, and the fields of a Gaudi config with their content."""


def environment(config: JobConfig) -> dict[str, str]:
    """The variables that a card's process needs before it imports `habana_frameworks`.

    Args:
        config: the job, its Gaudi config resolved to a mapping.

    Returns:
        Variables for Ray's runtime environment, which puts the node's own HOME in.
    """
    gaudi = config.gaudi
    # Releases differ in what an unset variable means, so it is always set.
    variables = {"PT_HPU_LAZY_MODE": "1" if gaudi.mode == "lazy" else "0"}
    if gaudi.recipe_cache is not None:
        # https://docs.habana.ai/en/latest/PyTorch/Reference/Runtime_Flags.html: path, clear it first, size in MB
        variables[_RECIPE_CACHE] = f"{gaudi.recipe_cache},false,{gaudi.recipe_cache_mb}"
    if gaudi.quantize is not None:
        variables["QUANT_CONFIG"] = gaudi.quantize.config
    ops = _op_lists(config)
    for name in ops:
        # Optimum-habana would write to two fixed files in /tmp, which all cards and users of a node share.
        digest = hashlib.sha256("\n".join(ops[name]).encode()).hexdigest()[:16]
        variables[name] = f"${{HOME}}/.cache/gaudi-batch/{_OP_LISTS[name]}-{digest}.txt"
    return variables


def prepare(config: JobConfig) -> None:
    """Makes the files and directories that the environment names, before anything else happens in a card's process."""
    for name, ops in _op_lists(config).items():
        path = Path(os.environ[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text("".join(f"{op}\n" for op in ops))
        fresh.replace(path)
    if _recipe_cache():
        Path(_recipe_cache()).mkdir(parents=True, exist_ok=True)


def recipes_of(config: JobConfig, output: Storage, stack: Mapping[str, str]) -> Recipes | None:
    """The recipes of this node beside those in storage; None where none are kept there.

    Args:
        config: the job.
        output: its output.
        stack: of this card, see stack.py.

    Raises:
        InputError: the job names a place that can't be opened.
    """
    gaudi = config.gaudi
    if config.device != "hpu" or gaudi.recipe_cache is None or gaudi.recipe_store is None:
        return None
    storage, place = output, f"{RECIPES}/{place_of(stack)}"
    is_of_run = gaudi.recipe_store == OUTPUT
    if gaudi.recipe_store != OUTPUT:
        options = config.options_for(gaudi.recipe_store)
        storage, place = Storage(gaudi.recipe_store, options, config.storage_patience), place_of(stack)
    return Recipes(Path(_recipe_cache()), storage, place, gaudi.recipe_cache_mb * 1024**2, keeps_all=not is_of_run)


def digest_of_quantization(quantize: QuantizeConfig) -> str:
    """The SHA-256 of what decides about a quantized model: Neural Compressor's configuration, and the files of scales
    whose names begin with its `dump_stats_path`. All cards of a run must have the same."""
    path = Path(quantize.config).expanduser()
    content = path.read_bytes()
    hasher = hashlib.sha256(content)
    prefix = Path(str(json.loads(content).get("dump_stats_path") or "./hqt_output/measure"))
    for file in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}*")):
        if file.is_file():
            hasher.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return hasher.hexdigest()


def require_quantization(quantize: QuantizeConfig) -> None:
    """Raises a RuntimeError, with the way out, if this node can't quantize as the job says."""
    if importlib.util.find_spec("neural_compressor") is None:
        raise RuntimeError(
            "gaudi.quantize needs Intel Neural Compressor: pip install neural_compressor_pt of Intel's release"
        )
    try:
        content = json.loads(Path(quantize.config).read_text(encoding="utf-8"))
        mode = str(content["mode"]).lower()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"gaudi.quantize: config {quantize.config!r} is no configuration of Neural Compressor that this node can"
            f" read: {error!r}"
        ) from None
    if mode != quantize.mode:
        raise RuntimeError(
            f"gaudi.quantize: mode is {quantize.mode!r}, and that of {quantize.config!r} is {mode!r}, which upstream"
            " goes by; make them the same"
        )


def _recipe_cache() -> str:
    """The directory of recipes, as this process's environment names it; empty if it names none."""
    return os.environ.get(_RECIPE_CACHE, "").rsplit(",", 2)[0]


def _op_lists(config: JobConfig) -> dict[str, list[str]]:
    """The operations for each variable; empty unless the config has both lists, as optimum-habana requires."""
    if config.gaudi.mode != "lazy":
        return {}
    mapping = gaudi_mapping(config)
    lists = {name: mapping.get(field) for name, field in _OP_LISTS.items()}
    return {} if any(ops is None for ops in lists.values()) else lists  # type: ignore[return-value]


def gaudi_mapping(config: JobConfig) -> dict[str, Any]:
    """A job's resolved Gaudi config, with the changes that `dtype` makes."""
    assert not isinstance(config.gaudi.config, str)
    autocast = {} if config.dtype is None else {"use_torch_autocast": False}
    return {**config.gaudi.config, **autocast}


def require_stack(mode: str) -> None:
    """Raises a RuntimeError, with the way out, if this Python lacks what a Gaudi card needs in this mode."""
    if importlib.util.find_spec("habana_frameworks") is None:
        raise RuntimeError(
            "habana_frameworks is not installed here; it comes with Intel's Gaudi container and is on no public index."
            " Run in that container, or choose --device cpu"
        )
    if mode != "lazy":
        return
    try:
        importlib.metadata.version("optimum-habana")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(
            "optimum-habana is not installed here; install gaudi-batch[gaudi] with -c constraints-gaudi.txt, or choose"
            " --gaudi.mode compile or eager, which need none"
        ) from None
