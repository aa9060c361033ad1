"""The pipeline classes and schedulers that are supported, with their properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineClass:
    """A supported pipeline class of diffusers."""

    gaudi_class: str
    """The corresponding class of optimum-habana."""
    multiple: int
    """Sides of an image must be multiples of this, in pixels."""
    scheduler: str
    """The scheduler, by name, if the job names none."""
    gaudi_schedulers: Mapping[str, str]
    """Its schedulers of optimum-habana, by name, that take one generator for each image."""


SUPPORTED = {
    "StableDiffusionPipeline": PipelineClass("GaudiStableDiffusionPipeline", 8, "ddim", {"ddim": "GaudiDDIMScheduler"}),
}
"""The pipeline classes that are supported, by the name in a model's model_index.json."""
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Schedulers of diffusers by name, for the cpu. None of them draws noise while it steps."""
NOISY_SCHEDULERS = {"ddpm", "euler_ancestral", "euler-ancestral", "lcm", "dpm++_sde", "k_dpm_2_ancestral", "tcd"}
NOISY_GAUDI_SCHEDULERS = NOISY_SCHEDULERS | {"euler"}
"""Schedulers of optimum-habana that draw noise from a single generator; its Euler does so at every step, needed or
not."""
