"""The model families that are supported: what differs between them, one row each.

A model is of the first row whose pipeline class is that of its model_index.json and whose `mark` is true of its files.
Values are the pipelines' own defaults in diffusers 0.35.1, or those of the models' cards on the hub, as each row says;
what the Gaudi pipelines can't do was read and tried of optimum-habana 1.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple


class Mark(NamedTuple):
    """What tells a variant from its siblings: fields of a JSON file in the model's directory, and its name."""

    file: str
    fields: Mapping[str, Any]
    name: str = ""
    """A part of the model's name, for variants whose files are the same."""


class Text(NamedTuple):
    """The tokenizer that decides whether a prompt is cut off."""

    tokenizer: str
    """Its name among the pipeline's components."""
    tokens: int | None = None
    """Tokens that are read, those that the tokenizer itself adds among them; None asks the tokenizer."""


@dataclass(frozen=True)
class Family:
    """What differs between pipeline classes, and between the models of one."""

    name: str
    """What people call it."""
    pipeline_class: str
    """Its class in diffusers, which model_index.json names."""
    gaudi_class: str
    """The corresponding class of optimum-habana."""
    steps: int
    """Denoising steps, if the job names none."""
    guidance_scale: float
    """If the job names none."""
    schedulers: Mapping[str, str]
    """Schedulers for the cpu: a class of diffusers by name. The first is used if the job names none."""
    gaudi_schedulers: Mapping[str, str]
    """Schedulers for hpu that take a generator for each image: a class of optimum-habana, or one of diffusers."""
    text: Text
    size_from: str | None = "unet/config.json"
    """The file whose `sample_size` gives the model's own size, in latents."""
    latents: int = 64
    """A side of the model's own size, in latents, if no file says it."""
    multiple: int = 8
    """Sides of an image must be multiples of this, in pixels."""
    mark: Mark | None = None
    guidance: str | None = "guidance_scale"
    """The argument that takes the guidance scale: this one, `true_cfg_scale`, or none."""
    takes_guidance: bool = True
    """Whether a guidance scale over 1 means something."""
    doubles: bool = True
    """Whether guidance doubles the batch that the denoiser sees, which is then another graph."""
    negative: str | None = ""
    """The negative prompt of a row that has none; None if the family takes no negative prompts."""
    other_prompts: tuple[str, ...] = ()
    """Arguments for further text encoders. None is given, so all of them read the prompt."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of each call."""
    always: Mapping[str, Any] = field(default_factory=lambda: {"num_images_per_prompt": 1})
    """Arguments of each call that nearly all classes have."""
    hpu_dtype: Literal["bfloat16"] | None = None
    """The type on hpu if the job names none; None is as the Gaudi config says."""
    denoiser: Literal["unet", "transformer"] = "unet"
    """The component that a graph holds."""
    attention: Literal["asked", "fused", "plain"] = "asked"
    """The denoiser's on hpu: fused if asked for, always fused, or never."""
    quantizes: bool = False
    """Whether optimum-habana's pipeline computes in eight-bit floats if asked to."""
    drops_single_graphs: bool = True
    """Whether the graphs of one key can be given up; else all go together."""
    text_lengths: tuple[int, ...] = ()
    """If the transformer attends to the padding of its text: the numbers of tokens to which texts are padded, with a
    mask."""
    is_known: bool = True
    """Whether a row of this table says all of this; else the signature of the class's call does (signatures.py)."""


_OLD_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_XL_SCHEDULERS = {"euler": "EulerDiscreteScheduler"} | _OLD_SCHEDULERS
_FLOW = {"flow_match_euler": "FlowMatchEulerDiscreteScheduler"}
_GAUDI_FLOW = {"flow_match_euler": "GaudiFlowMatchEulerDiscreteScheduler"}

_XL = Family(
    name="Stable Diffusion XL",
    pipeline_class="StableDiffusionXLPipeline",
    gaudi_class="GaudiStableDiffusionXLPipeline",
    steps=50,
    guidance_scale=5.0,
    schedulers=_XL_SCHEDULERS,
    # Gaudi's own Euler takes no list of generators; PNDM ends early, since steps are counted and not evaluations.
    gaudi_schedulers={
        "euler": "EulerDiscreteScheduler",
        "ddim": "GaudiDDIMScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
        "unipc": "UniPCMultistepScheduler",
    },
    text=Text("tokenizer"),
    other_prompts=("prompt_2",),
    latents=128,
    hpu_dtype="bfloat16",
)
_SD3 = Family(
    name="Stable Diffusion 3",
    pipeline_class="StableDiffusion3Pipeline",
    gaudi_class="GaudiStableDiffusion3Pipeline",
    steps=28,
    guidance_scale=7.0,
    schedulers=_FLOW,
    gaudi_schedulers=_GAUDI_FLOW,
    text=Text("tokenizer_3", 256),
    other_prompts=("prompt_2", "prompt_3"),
    size_from="transformer/config.json",
    latents=128,
    multiple=16,
    arguments={"max_sequence_length": 256},
    hpu_dtype="bfloat16",
    denoiser="transformer",
    attention="fused",
    quantizes=True,
)
_FLUX = Family(
    name="FLUX.1 dev",
    pipeline_class="FluxPipeline",
    gaudi_class="GaudiFluxPipeline",
    steps=28,
    guidance_scale=3.5,
    schedulers=_FLOW,
    gaudi_schedulers=_GAUDI_FLOW,
    text=Text("tokenizer_2", 512),
    other_prompts=("prompt_2",),
    size_from=None,
    latents=128,
    multiple=16,
    negative=None,
    doubles=False,
    arguments={"max_sequence_length": 512},
    hpu_dtype="bfloat16",
    denoiser="transformer",
    attention="fused",
    quantizes=True,
    drops_single_graphs=False,
)

FAMILIES = (
    Family(
        name="Stable Diffusion 1 and 2",
        pipeline_class="StableDiffusionPipeline",
        gaudi_class="GaudiStableDiffusionPipeline",
        steps=50,
        guidance_scale=7.5,
        schedulers=_OLD_SCHEDULERS,
        gaudi_schedulers={"ddim": "GaudiDDIMScheduler"},
        text=Text("tokenizer"),
    ),
    # Turbo's and Lightning's cards: up to 4 steps, no guidance, and steps spaced from the end. Turbo's own scheduler
    # draws noise, so its Euler without noise is taken, as Lightning's card has it.
    replace(
        _XL,
        name="Stable Diffusion XL of few steps (Turbo, Lightning)",
        steps=4,
        guidance_scale=0.0,
        mark=Mark("scheduler/scheduler_config.json", {"timestep_spacing": "trailing", "prediction_type": "epsilon"}),
    ),
    _XL,
    # The cards of 3.5: large 28 steps and 3.5, medium 40 and 4.5. Only 3.5 medium has blocks with a second attention,
    # and only 3.5 normalises queries and keys.
    replace(
        _SD3,
        name="Stable Diffusion 3.5 medium",
        steps=40,
        guidance_scale=4.5,
        mark=Mark("transformer/config.json", {"dual_attention_layers": list(range(13))}),
    ),
    # Its card: 4 steps, no guidance. Its files but for the weights are those of large.
    replace(
        _SD3,
        name="Stable Diffusion 3.5 large turbo",
        steps=4,
        guidance_scale=0.0,
        mark=Mark("transformer/config.json", {"qk_norm": "rms_norm"}, "3.5-large-turbo"),
    ),
    replace(
        _SD3,
        name="Stable Diffusion 3.5 large",
        guidance_scale=3.5,
        mark=Mark("transformer/config.json", {"qk_norm": "rms_norm"}),
    ),
    _SD3,
    # Schnell's card: 4 steps, no guidance, 256 tokens. Only the other variants take guidance as an input.
    replace(
        _FLUX,
        name="FLUX.1 schnell",
        steps=4,
        guidance_scale=0.0,
        text=Text("tokenizer_2", 256),
        arguments={"max_sequence_length": 256},
        mark=Mark("transformer/config.json", {"guidance_embeds": False}),
        takes_guidance=False,
    ),
    _FLUX,
    Family(
        name="Qwen-Image",
        pipeline_class="QwenImagePipeline",
        gaudi_class="GaudiQwenImagePipeline",
        steps=50,
        guidance_scale=4.0,
        schedulers=_FLOW,
        gaudi_schedulers=_FLOW,
        text=Text("tokenizer", 1024),
        size_from=None,
        latents=128,
        multiple=16,
        guidance="true_cfg_scale",
        negative=" ",
        doubles=False,
        arguments={"max_sequence_length": 1024},
        hpu_dtype="bfloat16",
        denoiser="transformer",
        attention="plain",
        quantizes=True,
        drops_single_graphs=False,
        text_lengths=(128, 256, 512, 1024),
    ),
)
"""Rows of one pipeline class: those with a mark first."""
SIMULATED = replace(FAMILIES[0], name="simulated", pipeline_class="simulated")
"""Of the device that only sleeps and paints."""
NOISY_SCHEDULERS = {"ddpm", "euler_ancestral", "euler-ancestral", "lcm", "dpm++_sde", "k_dpm_2_ancestral", "tcd"}
"""Schedulers that draw noise while they step."""
