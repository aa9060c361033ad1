"""Published rates of one Gaudi card, with the settings that they were measured with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gaudi_batch.job import Job


@dataclass(frozen=True)
class Published:
    """What somebody has published of a model."""

    source: str
    family: str
    """Name of the model's family."""
    side: int
    """Width and height in pixels."""
    steps: int
    scheduler: str
    """Name of its class."""
    dtype: str
    """As `Job.dtype`."""
    batch_size: int
    rates: Mapping[str, float]
    """Images a second, by device."""
    latencies: Mapping[str, float] = field(default_factory=dict)
    """Seconds for a batch of 1, by device."""
    guided: bool = True

    def is_of(self, job: Job, batch_size: int) -> bool:
        """Whether a job, measured in batches of this size, has the same settings."""
        bucket, model = job.rules.bucket, job.model
        gaudi = job.config.gaudi
        if gaudi.mode != "lazy" or gaudi.quantize is not None or model.loras:
            return False
        settings = (self.family, self.side, self.side, self.steps, self.scheduler, self.dtype, self.guided)
        return batch_size == self.batch_size and settings == (
            model.family.name,
            bucket.width,
            bucket.height,
            bucket.steps,
            model.scheduler,
            job.dtype,
            bucket.graph_key.guided,
        )


_DOCUMENTED = "diffusers' page on Gaudi"
_FLOORS = "a floor of optimum-habana's tests"
_AUTOCAST = "autocast to bfloat16"
_FIRST = "first-generation Gaudi"

PUBLISHED = (
    Published(
        f"{_DOCUMENTED}, Stable Diffusion 1.5",
        "Stable Diffusion 1 and 2",
        512,
        50,
        "GaudiDDIMScheduler",
        _AUTOCAST,
        8,
        {_FIRST: 0.283, "Gaudi2": 0.904},
        {_FIRST: 4.29, "Gaudi2": 1.54},
    ),
    Published(
        f"{_FLOORS}, Stable Diffusion 1.4",
        "Stable Diffusion 1 and 2",
        512,
        50,
        "GaudiDDIMScheduler",
        "bfloat16",
        7,
        {_FIRST: 0.275, "Gaudi2": 1.086, "Gaudi3": 2.168},
    ),
    Published(
        f"{_FLOORS}, Stable Diffusion 2.1, attention not fused",
        "Stable Diffusion 1 and 2",
        768,
        50,
        "GaudiDDIMScheduler",
        _AUTOCAST,
        7,
        {_FIRST: 0.114, "Gaudi2": 0.394},
    ),
    Published(
        _FLOORS,
        "Stable Diffusion 3",
        1024,
        28,
        "GaudiFlowMatchEulerDiscreteScheduler",
        "bfloat16",
        1,
        {"Gaudi2": 0.006},
    ),
    Published(
        _FLOORS,
        "FLUX.1 schnell",
        1024,
        4,
        "GaudiFlowMatchEulerDiscreteScheduler",
        "float32",
        1,
        {"Gaudi2": 0.03},
        guided=False,
    ),
    Published(
        _FLOORS,
        "Qwen-Image",
        512,
        4,
        "FlowMatchEulerDiscreteScheduler",
        "bfloat16",
        1,
        {"Gaudi2": 0.680},
    ),
)
"""From the page "Habana Gaudi" of diffusers' documentation (0.33), and from optimum-habana 1.21's
tests/baselines/fixture/tests/test_diffusers.json, which passes from 95 % of a floor on. Where that has the same number
for Gaudi 3 as for Gaudi 2, it was copied and is left out, as is the floor of XL, which was set under autocast: XL runs
in bfloat16 or float32 here. A floor counts without the first batches and the encoding of texts, and `bench` counts
whole calls."""
