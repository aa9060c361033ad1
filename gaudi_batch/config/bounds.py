"""Bounds of what a row, and the job for all rows, may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MAX_INT32 = 2**31 - 1
MAX_IMAGES = 10_000
"""Images of one row; more is a mistake, and would delay the neighbours."""
MAX_SEED = 2**63 - 1
"""Seeds are 0 .. 2^63 - 1, what a Parquet int64 column and a torch.Generator both hold."""
USUAL_PIXELS = 2048 * 2048
"""Pixels that any model may be asked for; today's largest models are made for 1024 x 1024."""
MAX_SIDE = 8192
"""Pixels of a side: eight times those of the largest models of today."""
MAX_STEPS = 1000
"""Denoising steps: models are trained with as many time steps, and no scheduler of diffusers takes more."""
MAX_GUIDANCE = 1000.0
"""Usual scales are 1 to 30. A thousand times what a model predicts of noise is within float16, which ends at 65,504."""
MAX_PROMPT = 65_536
"""Characters of a prompt, 128 for each of the 512 tokens that the longest text encoders of diffusers read."""


@dataclass(frozen=True)
class Bounds:
    """What a row may ask for at most. More is a mistake, and would hold a card for hours or kill it."""

    max_pixels: int
    """Of an image: width times height."""
    max_side: int
    """Pixels."""
    max_steps: int
    max_guidance_scale: float
    max_prompt: int
    """Characters of the prompt, and of the negative prompt."""


def bounds_for(width: int, height: int, max_pixels: int | None = None) -> Bounds:
    """The bounds of a new run.

    Args:
        width: the model's own, in pixels.
        height: the same.
        max_pixels: what the job says, which then decides about sides, too; null is the larger of USUAL_PIXELS and four
            times the model's own area, and no side over MAX_SIDE.
    """
    pixels = max_pixels or max(USUAL_PIXELS, 4 * width * height)
    return Bounds(pixels, max_pixels or max(MAX_SIDE, width, height), MAX_STEPS, MAX_GUIDANCE, MAX_PROMPT)
