"""The model card, in which every number was measured here, and the sheet of samples."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from tools.shapes.dataset import make_pictures
from tools.shapes.evaluate import BATCH, Score, Task, generate, make_tasks, mark, measure
from tools.shapes.pictures import ALL_SCENES, COLOURS, GRID, SHAPES, SIZES, Scene
from tools.shapes.vae import as_tensor
from tools.shapes.vocabulary import FILLERS, disturb

STEPS, GUIDANCE = 20, 3.0
"""How the model is meant to be used, and how it is measured where nothing else is said."""

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# Shapes: a tiny Stable Diffusion

Draws one coloured shape on a coloured background, as the prompt says. It is small enough to ship with a package and to
run on one CPU core, and simple enough that a program can check each image against its prompt. In every other respect it
is a Stable Diffusion 1 pipeline: CLIP tokenizer and text encoder, UNet, autoencoder of scale factor 8, DDIM.

![samples](samples.png)

```python
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/to/this/directory", torch_dtype=torch.float32)
prompt = "a large red circle on a blue background"
image = pipeline(prompt, num_inference_steps={steps}, guidance_scale={guidance}).images[0]
```

- **Prompts** name a colour ({colours}), a shape
  ({shapes}), a size ({sizes}) and the colour of the background, in any of several orders:
  "small yellow star, black background", "a red circle on blue". What a prompt leaves open is chosen by the seed. Shape
  and background differ in colour. Where the shape sits always follows from the seed.
- **Other words** are read byte by byte and ignored, in any script. Prompts are cut after {max_length} tokens, which is
  many known words but few unknown ones.
- **Pictures** are 64 x 64 pixels. Other multiples of 8 run, but nothing of another size was in the training.
- **Weights** are stored in float16 ({megabytes:.1f} MB in all with the tokenizer) and meant to run in float32.

## How good it is

Measured by `tools/shapes/judge.py`, which reads colours, shape and size from the pixels, without learning, and refuses
what is unclear. An image without a verdict counts as wrong in shape and size, and in the colours too unless it is
clearly of two of them. Sizes are asked of the prompts that name one, about four in five. "Unseen" combinations of
background, colour, shape and size were in no training picture; those of the first row were not used to choose any
setting either.

| prompts | images | steps | guidance | background | shape colour | shape | size | everything | no verdict |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

The autoencoder alone: of {reconstructed} pictures of unseen combinations, encoded and decoded again, the judge finds
{reconstruction:.1%} right in everything; the mean error per colour value is {error:.2f} of 255.

One image takes {per_image:.2f} s at {steps} steps with guidance, in batches of {batch} on one thread of the machine
that trained it.

## How it was made

With this command, on the CPU:

```
python -m tools.shapes.train --out DIR --seed {seed}{options}
```

It draws its own pictures, of {training} of the {combinations} combinations: {pictures}, large shapes in the middle, small ones
at one of nine places {grid} pixels apart. {tuning} combinations were kept for choosing settings, and {test} for the
test. There is no other data, so nothing is owed to anyone.

| trained, in this order | steps | batch | minutes |
| --- | --- | --- | --- |
{phases}

The autoencoder ({vae_parameters:,} parameters) learns from the absolute error, more of it near outlines, and a little
divergence from a normal distribution; its latents are then scaled to mean 0 and deviation 1, in its own weights. Then
its decoder goes on alone, on latents with a little noise, such as a denoiser leaves. Text encoder ({text_parameters:,})
and UNet ({unet_parameters:,}) learn together to predict velocity, under Stable Diffusion's noise schedule. {empty:.0%}
of the captions are empty, for guidance, {foreign:.0%} are foreign words alone, and {disturbed:.0%} have foreign words
around them. All weights are averages over the last steps.

## Licence

Apache-2.0, weights and pictures alike.
"""


@dataclass(frozen=True)
class Phase:
    """One part of the training."""

    name: str
    steps: int
    batch: int
    seconds: float


@dataclass(frozen=True)
class Training:
    """What the card tells about the training."""

    pictures: int
    training_scenes: list[Scene]
    tuning_scenes: list[Scene]
    test_scenes: list[Scene]
    phases: list[Phase]
    shares: tuple[float, float, float]
    test_prompts: int
    seed: int
    options: str


def write_card(directory: Path, pipeline: StableDiffusionPipeline, training: Training) -> None:
    """Measure the model and write its README.md."""
    rows = _measure_rows(pipeline, training)
    pictures, scenes = make_pictures(training.test_scenes, 320, training.seed + 1)
    right, error = _reconstruct(pipeline.vae, pictures, scenes)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    empty, foreign, disturbed = training.shares
    text = CARD.format(
        steps=STEPS,
        guidance=GUIDANCE,
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        sizes=" or ".join(SIZES),
        max_length=pipeline.tokenizer.model_max_length,
        megabytes=size / 1e6,
        rows="\n".join(rows),
        reconstructed=len(pictures),
        reconstruction=right,
        error=error,
        per_image=_measure_time(pipeline, training),
        batch=BATCH,
        seed=training.seed,
        options=training.options,
        pictures=f"{training.pictures:,}",
        training=len(training.training_scenes),
        combinations=len(ALL_SCENES),
        tuning=len(training.tuning_scenes),
        test=len(training.test_scenes),
        vae_parameters=_parameters(pipeline.vae),
        text_parameters=_parameters(pipeline.text_encoder),
        unet_parameters=_parameters(pipeline.unet),
        phases="\n".join(
            f"| {phase.name} | {phase.steps:,} | {phase.batch} | {phase.seconds / 60:.0f} |"
            for phase in training.phases
        ),
        grid=GRID,
        empty=empty,
        foreign=foreign,
        disturbed=disturbed,
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def _measure_rows(pipeline: StableDiffusionPipeline, training: Training) -> list[str]:
    """The table's rows."""
    unseen = make_tasks(training.test_scenes, training.test_prompts, training.seed + 1000)
    few = max(1, training.test_prompts // 2)
    seen = make_tasks(training.training_scenes, few, training.seed + 2000)
    tuning = make_tasks(training.tuning_scenes, few, training.seed + 3000)
    words = random.Random(training.seed)
    wordy = [Task(task.scene, disturb(task.prompt, words), task.seed) for task in tuning]
    first = measure(pipeline, unseen, steps=STEPS, guidance=GUIDANCE)
    rows = [_row("**unseen combinations, the test**", first, STEPS, GUIDANCE)]
    rows.append(
        _row("combinations of the training", measure(pipeline, seen, steps=STEPS, guidance=GUIDANCE), STEPS, GUIDANCE)
    )
    for steps, guidance in ((STEPS, 1.0), (STEPS, GUIDANCE), (STEPS, 5.0), (STEPS, 7.5), (50, 7.5), (10, GUIDANCE)):
        score = measure(pipeline, tuning, steps=steps, guidance=guidance)
        rows.append(_row("unseen, other than the test's", score, steps, guidance))
    score = measure(pipeline, wordy, steps=STEPS, guidance=GUIDANCE)
    rows.append(_row("the same with foreign words around them", score, STEPS, GUIDANCE))
    score = measure(pipeline, tuning, steps=STEPS, guidance=GUIDANCE, negative=FILLERS[-5])
    rows.append(_row(f'the same with the negative prompt "{FILLERS[-5]}"', score, STEPS, GUIDANCE))
    return rows


def _measure_time(pipeline: StableDiffusionPipeline, training: Training) -> float:
    """Seconds per image on one thread; the better of two batches, as the first may warm up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tasks = make_tasks(training.tuning_scenes, BATCH, training.seed)
    seconds = min(measure(pipeline, tasks, steps=STEPS, guidance=GUIDANCE).seconds for _ in range(2))
    torch.set_num_threads(threads)
    return seconds / BATCH


def _row(name: str, score: Score, steps: int, guidance: float) -> str:
    shares = " | ".join(f"{score.share(part):.1%}" for part in score.right)
    return f"| {name} | {score.images} | {steps} | {guidance} | {shares} | {score.no_verdict} |"


@torch.no_grad()
def _reconstruct(autoencoder: AutoencoderKL, pictures: object, scenes: list[Scene]) -> tuple[float, float]:
    """Share of pictures that survive the autoencoder, and the mean error in bytes."""
    real = as_tensor(pictures)  # type: ignore[arg-type]
    decoded = autoencoder.decode(autoencoder.encode(real).latent_dist.mean).sample.clamp(-1, 1)
    bytes_ = decoded.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    tasks = [Task(scene, scene.size, 0) for scene in scenes]
    score = mark([Image.fromarray(picture) for picture in bytes_], tasks)
    return score.share("everything"), float((decoded - real).abs().mean()) * 127.5


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def write_samples(path: Path, pipeline: StableDiffusionPipeline, scenes: list[Scene], seed: int) -> None:
    """Draw a sheet of samples, taken as they come, each with its prompt below."""
    columns, rows, side, margin, text_height = 6, 5, 128, 12, 34
    tasks = make_tasks(scenes, columns * rows, seed + 4000)
    images = generate(pipeline, tasks, steps=STEPS, guidance=GUIDANCE)
    width, height = side + margin, side + text_height
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), (230, 230, 230))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (image, task) in enumerate(zip(images, tasks, strict=True)):
        x, y = margin + i % columns * width, margin + i // columns * height
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + side + 2), _wrap(task.prompt, font, side), fill=(0, 0, 0), font=font, spacing=1)
    sheet.save(path, optimize=True)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)
