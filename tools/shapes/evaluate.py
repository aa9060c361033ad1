"""How good the model is: pictures from prompts, judged."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field, replace

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from tools.shapes.judge import NoVerdict, judge, judge_colours
from tools.shapes.pictures import FULL_CAPTIONS, SIZELESS_CAPTIONS, Scene, say

BATCH = 8


@dataclass(frozen=True)
class Task:
    """One picture to make, and what it should show."""

    scene: Scene
    prompt: str
    seed: int


@dataclass
class Score:
    """How many pictures were right, by what the prompts asked for."""

    images: int = 0
    sized: int = 0
    """Pictures whose prompt names a size."""
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*Scene.__annotations__, "everything"), 0))
    refused: dict[str, int] = field(default_factory=dict)
    """Pictures without a verdict, by reason; of these, at most the colours can be right."""
    seconds: float = 0.0

    def share(self, part: str) -> float:
        """Share of pictures of which this part is right; sizes are asked of prompts that name one."""
        return self.right[part] / max(1, self.sized if part == "size" else self.images)

    def __str__(self) -> str:
        """One line for a log."""
        return "  ".join(f"{part} {self.share(part):.1%}" for part in self.right) + f"  no verdict {self.no_verdict}"

    @property
    def no_verdict(self) -> int:
        """Pictures in which the judge found nothing that it knows."""
        return sum(self.refused.values())


def make_tasks(scenes: list[Scene], count: int, seed: int) -> list[Task]:
    """Prompts about scenes, each scene as often as any other; one in five leaves the size open."""
    rng = random.Random(f"tasks/{seed}")
    tasks = []
    for i in range(count):
        scene = scenes[i % len(scenes)]
        templates = FULL_CAPTIONS if rng.random() < 0.8 else SIZELESS_CAPTIONS
        tasks.append(Task(scene, say(rng.choice(templates), scene), rng.getrandbits(32)))
    return tasks


def generate(
    pipeline: StableDiffusionPipeline, tasks: list[Task], *, steps: int, guidance: float, negative: str | None = None
) -> list[Image.Image]:
    """Make the pictures, each from noise of its own seed."""
    images: list[Image.Image] = []
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        images += pipeline(
            [task.prompt for task in part],
            negative_prompt=None if negative is None else [negative] * len(part),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(task.seed) for task in part],
        ).images
    return images


def mark(images: list[Image.Image], tasks: list[Task]) -> Score:
    """Let the judge compare pictures with what they should show."""
    score = Score(images=len(images))
    for image, task in zip(images, tasks, strict=True):
        sized = task.scene.size in task.prompt
        score.sized += sized
        try:
            background, colour = judge_colours(image)
            score.right["background"] += background == task.scene.background
            score.right["colour"] += colour == task.scene.colour
            seen = judge(image)
        except NoVerdict as reason:
            score.refused[str(reason)] = score.refused.get(str(reason), 0) + 1
            continue
        score.right["shape"] += seen.shape == task.scene.shape
        score.right["size"] += sized and seen.size == task.scene.size
        score.right["everything"] += seen == (task.scene if sized else replace(task.scene, size=seen.size))
    return score


def measure(
    pipeline: StableDiffusionPipeline, tasks: list[Task], *, steps: int, guidance: float, negative: str | None = None
) -> Score:
    """Make the pictures and judge them, with the seconds that making them took."""
    begun = time.perf_counter()
    images = generate(pipeline, tasks, steps=steps, guidance=guidance, negative=negative)
    seconds = time.perf_counter() - begun
    score = mark(images, tasks)
    score.seconds = seconds
    return score
