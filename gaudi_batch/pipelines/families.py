"""What the product knows of each pipeline class of diffusers, and of schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineClass:
    """What the product knows of a pipeline class of diffusers."""

    gaudi_class: str
    """Its counterpart in optimum-habana."""
    multiple: int
    """Pixels of which a side must be a multiple."""
    scheduler: str
    """Scheduler, by name, of a job that names none."""
    gaudi_schedulers: Mapping[str, str]
    """The schedulers of optimum-habana for it, by name, that take one generator for each image."""


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
"""Those of optimum-habana draw noise from a single generator; its Euler does so at every step, needed or not."""
