"""The offline scenario of MLPerf Inference's text-to-image benchmark, as a job has it, beside what was published.

What this prints is no result of MLPerf: that is measured by its load generator and reviewed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from gaudi_batch.bench.rate import caveat, table
from gaudi_batch.job import Job

SAMPLES = 5_000
"""Captions of COCO 2014 in the benchmark's data set."""
NEGATIVE_PROMPT = "normal quality, low quality, worst quality, low res, blurry, nsfw, nude"
"""Of the reference implementation, as are size, steps, guidance and scheduler
(https://github.com/mlcommons/inference, text_to_image)."""
SIDE, STEPS, GUIDANCE = 1024, 20, 8.0
DEVICE = "hpu GAUDI2"
MODEL, SCHEDULER = "stabilityai/stable-diffusion-xl-base-1.0", "EulerDiscreteScheduler"
FREE_COLUMNS = {"id", "prompt", "seed"}
"""Columns of the prompts that change nothing of what is measured."""


class PublishedResult(NamedTuple):
    """A result that MLCommons has published."""

    source: str
    cards: int
    samples_per_s: float


PUBLISHED = PublishedResult("MLPerf Inference v4.0, Intel, 8 Gaudi 2, offline, FP8", 8, 6.257)
"""https://mlcommons.org/benchmarks/inference-datacenter, closed division."""


class Measured(NamedTuple):
    """What a run has made."""

    device: str
    """As its cards name it."""
    images: int
    cards: int
    wall_s: float
    """From the command to the last image in storage."""
    images_per_s: float | None
    """Of all cards, without loading, warm-up and waiting; None before the first steady batch."""
    failed_rows: int = 0

    @classmethod
    def of(cls, summary: Mapping[str, Any], stack: Mapping[str, str]) -> Measured:
        """Of a summary of a run, and what its cards have."""
        cards = sum(card["images"] > 0 for card in summary["cards"].values())
        device, wall_s = stack.get("device", ""), summary["wall_s"] or 0.0
        return cls(device, summary["images"], cards, wall_s, summary["images_per_s"], summary["failed_rows"])


def differences(job: Job, measured: Measured) -> list[str]:
    """What a job has otherwise than the benchmark, in words."""
    bucket, config = job.rules.bucket, job.config
    columns = ", ".join(sorted(job.dataset.columns.keys() - FREE_COLUMNS))
    pairs = {
        "model": (job.model.name, MODEL),
        "lora": (", ".join(lora.name for lora in job.model.loras) or "none", "none"),
        "width": (bucket.width, SIDE),
        "height": (bucket.height, SIDE),
        "steps": (bucket.steps, STEPS),
        "guidance_scale": (bucket.guidance_scale, GUIDANCE),
        "scheduler": (job.model.scheduler, SCHEDULER),
        "negative_prompt": (config.negative_prompt, NEGATIVE_PROMPT),
        "num_images": (config.num_images, 1),
        "what rows say themselves": (columns or "nothing", "nothing"),
        "images": (measured.images, SAMPLES),
        "failed rows": (measured.failed_rows, 0),
    }
    different = [f"{name} is {is_now} and there {rule}" for name, (is_now, rule) in pairs.items() if is_now != rule]
    if measured.device != DEVICE:
        different.append(f"the device is {measured.device or 'unknown'} and there {DEVICE}")
    return different


def describe(job: Job, measured: Measured) -> dict[str, Any]:
    """What `report` says, for a program; `published` is null unless the job is the same on the same kind of card."""
    different = differences(job, measured)
    return {**measured._asdict(), "differences": different, "published": None if different else PUBLISHED._asdict()}


def report(job: Job, measured: Measured) -> str:
    """Samples a second of a run, and the published ones if the job is the same on real cards."""
    cards = measured.cards
    rows = [("samples/s", "all cards", "a card")]
    end_to_end = measured.images / measured.wall_s if measured.images and measured.wall_s else None
    for what, rate in (
        ("from the command to the last image in storage", end_to_end),
        ("without loading, warm-up and waiting", measured.images_per_s),
    ):
        rows.append((what, _rate(rate), _rate(rate / cards if rate and cards else None)))
    different = differences(job, measured)
    if not different:
        each = PUBLISHED.samples_per_s / PUBLISHED.cards
        together = f"{PUBLISHED.samples_per_s}" if measured.cards == PUBLISHED.cards else "-"  # of as many cards
        rows.append((PUBLISHED.source, together, f"{each:.3f}"))
    head = f"{job.model.name}: {job.rules.bucket}, {job.dtype}; {measured.images} images on {cards} x {measured.device}"
    notes = [
        "No result of MLPerf: its load generator was not used, and each image has noise of its own seed in place of",
        f"the benchmark's fixed latents. The published result is in FP8; this is {job.dtype}.",
    ]
    if different:
        notes = [f"Nothing published stands beside this: {'; '.join(different)}"]
    return "\n".join([*caveat(measured.device), head, "", *table(rows), "", *notes])


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
