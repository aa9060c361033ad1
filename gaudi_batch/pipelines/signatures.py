"""Families of pipeline classes that the table does not have, from how diffusers' source says that they are called.

The source is parsed and not imported: a driver may lack torch, and all of diffusers takes seconds to import.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gaudi_batch.pipelines.families import Family, Text

NEEDED = {"prompt", "generator", "output_type", "height", "width", "num_inference_steps"}
"""Arguments of a call without which no image can be made as a job asks for it."""
OTHER_INPUTS = re.compile(r"(.*_)?(images?|video|videos|frames)(_.*)?|rgb|source_prompt")
"""Arguments of calls that make an image out of another, or a video."""
IP_ADAPTER = re.compile(r"ip_adapter_.*|negative_ip_adapter_.*|num_images_per_prompt|clean_caption.*")
"""Arguments that the rule above would take for such."""


def family_of(pipeline_class: str, components: Mapping[str, Any]) -> Family | None:
    """What is known of a class of diffusers from its call alone; None if it is none, or makes no image from a text
    alone.

    Args:
        pipeline_class: its name.
        components: the model's, as model_index.json has them.
    """
    arguments = _arguments(pipeline_class)
    if arguments is None or not _is_text_to_image(arguments):
        return None
    guidance = next((name for name in ("guidance_scale", "true_cfg_scale") if name in arguments), None)
    scale = arguments.get(guidance or "")
    tokenizers = [name for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if components.get(name)]
    longest = arguments.get("max_sequence_length")
    # The text encoder with a length of its own is the last one, where there are several.
    text = Text(tokenizers[0], longest) if tokenizers and longest else Text("tokenizer")
    return Family(
        name=f"{pipeline_class} of diffusers",
        pipeline_class=pipeline_class,
        gaudi_class="",
        steps=int(arguments["num_inference_steps"] or 50),
        guidance_scale=float(scale) if isinstance(scale, (int, float)) else 0.0,
        schedulers={},
        gaudi_schedulers={},
        text=text,
        size_from="transformer/config.json" if components.get("transformer") else "unet/config.json",
        latents=128,
        guidance=guidance,
        takes_guidance=guidance is not None,
        negative="" if "negative_prompt" in arguments else None,
        always={"num_images_per_prompt": 1} if "num_images_per_prompt" in arguments else {},
        denoiser="transformer" if components.get("transformer") else "unet",
        attention="plain",
        is_known=False,
    )


class LoraLoader(NamedTuple):
    """What a pipeline reads of a LoRA."""

    components: tuple[str, ...]
    """The components that it changes; none for a pipeline that takes no LoRA."""
    converts: bool
    """Whether it reads names of other scripts than diffusers' own."""


def lora_loader(pipeline_class: str) -> LoraLoader | None:
    """How a pipeline loads LoRAs; None where diffusers is not here and can't be asked."""
    node = _class(pipeline_class) if pipeline_class.isidentifier() else None
    if node is None:
        return None
    while node is not None:
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        mixin = next((base for base in bases if base.endswith("LoraLoaderMixin")), None)
        if mixin is not None:
            return _loader(mixin)
        node = next((parent for base in bases if (parent := _class(base))), None)
    return LoraLoader((), False)


def _loader(mixin: str) -> LoraLoader | None:
    components: tuple[str, ...] | None = None
    converts = False
    while node := _lora_mixins().get(mixin):
        for statement in node.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_lora_loadable_modules":
                components = components or tuple(ast.literal_eval(statement.value))
            if isinstance(statement, ast.FunctionDef) and statement.name == "lora_state_dict":
                converts = converts or "_convert_" in ast.unparse(statement)
        mixin = next((base.id for base in node.bases if isinstance(base, ast.Name)), "")
    return None if components is None else LoraLoader(components, converts)


@functools.cache
def _lora_mixins() -> dict[str, ast.ClassDef]:
    """The classes by which diffusers' pipelines load LoRAs."""
    nodes = [node for path in _files_of("loaders") for node in ast.parse(path.read_text(encoding="utf-8")).body]
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef) and "Lora" in node.name}


def _is_text_to_image(arguments: Mapping[str, Any]) -> bool:
    others = [name for name in arguments if OTHER_INPUTS.fullmatch(name) and not IP_ADAPTER.fullmatch(name)]
    is_needed = [name for name, default in arguments.items() if default is _NEEDED and name != "prompt"]
    return arguments.keys() >= NEEDED and not others and not is_needed and arguments["output_type"] == "pil"


_NEEDED = object()
"""The default of an argument that has none."""


def _arguments(pipeline_class: str) -> dict[str, Any] | None:
    """The arguments of a pipeline's call with their defaults, those that are no constants as None; None if diffusers
    has no such class, or is not here."""
    node = _class(pipeline_class) if pipeline_class.isidentifier() else None
    while node is not None:
        for function in node.body:
            if isinstance(function, ast.FunctionDef) and function.name == "__call__":
                return _defaults(function.args)
        bases = (base.id for base in node.bases if isinstance(base, ast.Name))
        node = next((parent for base in bases if (parent := _class(base))), None)
    return None


def _defaults(arguments: ast.arguments) -> dict[str, Any]:
    positional = [argument.arg for argument in arguments.args][1:]
    defaults: list[Any] = [_constant(default) for default in arguments.defaults]
    named = dict(zip(positional, [_NEEDED] * (len(positional) - len(defaults)) + defaults, strict=True))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        named[argument.arg] = _NEEDED if default is None else _constant(default)
    return named


def _constant(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def _class(name: str) -> ast.ClassDef | None:
    """A class of diffusers' pipelines."""
    for source in _sources():
        if f"\nclass {name}(" in source:
            for node in ast.parse(source).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node
    return None


@functools.cache
def _sources() -> list[str]:
    """The files of diffusers' pipelines."""
    return [path.read_text(encoding="utf-8") for path in _files_of("pipelines")]


def _files_of(part: str) -> list[Path]:
    spec = importlib.util.find_spec("diffusers")
    places = (spec.submodule_search_locations if spec else None) or ()
    return [path for place in places for path in sorted(Path(place, part).rglob("*.py"))]
