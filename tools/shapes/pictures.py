"""Synthetic pictures of one coloured shape on a coloured background, with captions that say so."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 225, 50),
    "purple": (140, 45, 170),
    "orange": (250, 130, 20),
    "black": (12, 12, 12),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")

SIDE = 64
RADIUS = {"small": (11.5, 12.5), "large": (21.5, 22.5)}
"""Half the extent of a shape, in pixels of a picture of 64 x 64; every shape of one radius covers a similar area."""
GRID = 8
"""Distance of the places at which shapes sit, in pixels: one number of the latents, where all then look alike."""
PLACES = {"small": 1, "large": 0}
"""How many places there are on each side of the middle, in both directions."""

_COLOUR_JITTER = 4
_STAR_INNER = 0.46


@dataclass(frozen=True)
class Scene:
    """What a picture shows; the background is never of the shape's colour."""

    background: str
    colour: str
    shape: str
    size: str


ALL_SCENES = tuple(
    Scene(background, colour, shape, size)
    for background, colour, shape, size in itertools.product(COLOURS, COLOURS, SHAPES, SIZES)
    if background != colour
)


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape.

    Args:
        shape: one of `SHAPES`.
        x: horizontal position of the shape's centre of mass.
        y: vertical position of the same.
        radius: half of the shape's extent, as in `RADIUS`.

    Returns:
        The corners in order; a circle is a polygon of 72.
    """
    if shape == "circle":
        corners = [(radius, 2 * math.pi * k / 72) for k in range(72)]
    elif shape == "square":
        corners = [(0.92 * radius * math.sqrt(2), math.pi / 4 + math.pi / 2 * k) for k in range(4)]
    elif shape == "triangle":
        corners = [(1.2 * radius, -math.pi / 2 + 2 * math.pi / 3 * k) for k in range(3)]
    elif shape == "star":
        corners = [(1.15 * radius * (_STAR_INNER if k % 2 else 1.0), -math.pi / 2 + math.pi / 5 * k) for k in range(10)]
    else:
        raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in corners]


def coverage(
    shape: str, x: float, y: float, radius: float, width: int = SIDE, height: int = SIDE, supersampling: int = 4
) -> Image.Image:
    """Draw a shape in white on black, anti-aliased: each pixel says how much of it the shape covers.

    Args:
        shape: one of `SHAPES`.
        x: horizontal position of the centre of mass, in pixels; 0 is the left edge of the leftmost pixel.
        y: vertical position of the same, from the top.
        radius: half of the shape's extent, in pixels.
        width: of the result, in pixels.
        height: of the result, in pixels.
        supersampling: how many times finer the shape is drawn before it is averaged down.

    Returns:
        An image of mode "L".
    """
    fine = Image.new("L", (width * supersampling, height * supersampling), 0)
    # Pillow's coordinates name pixel centres, ours name edges: hence the half pixel.
    corners = [(a * supersampling - 0.5, b * supersampling - 0.5) for a, b in outline(shape, x, y, radius)]
    ImageDraw.Draw(fine).polygon(corners, fill=255)
    return fine.resize((width, height), Image.Resampling.BOX)


def paint(scene: Scene, x: float, y: float, radius: float, rng: random.Random) -> Image.Image:
    """Draw a scene with its shape at a place; the exact colours follow from `rng`.

    Args:
        scene: what to draw.
        x: horizontal position of the shape's centre of mass, in pixels from the left edge.
        y: vertical position of the same, from the top.
        radius: half of the shape's extent, in pixels; the scene's size is not looked at.
        rng: source of the deviations from the colours as they are named.

    Returns:
        An RGB image of 64 x 64 pixels.
    """
    mask = coverage(scene.shape, x, y, radius)
    picture = Image.new("RGB", (SIDE, SIDE), _near(scene.background, rng))
    picture.paste(_near(scene.colour, rng), (0, 0, SIDE, SIDE), mask)
    return picture


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as the training sees it; place, exact size and exact colours follow from `rng`."""
    radius = rng.uniform(*RADIUS[scene.size])
    places = PLACES[scene.size]
    x, y = (SIDE / 2 + GRID * rng.randint(-places, places) for _ in range(2))
    return paint(scene, x, y, radius, rng)


def _near(colour: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, c + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER))) for c in COLOURS[colour])


FULL_CAPTIONS = (
    "a {size} {colour} {shape} on a {background} background",
    "{size} {colour} {shape}, {background} background",
    "{size} {colour} {shape} on {background}",
    "a {background} background with a {size} {colour} {shape}",
    "{background} background, {size} {colour} {shape}",
    "a picture of a {size} {colour} {shape} on a {background} background",
    "a {colour} {shape}, {size}, on a {background} background",
)
"""Captions that say everything."""
SIZELESS_CAPTIONS = (
    "a {colour} {shape} on a {background} background",
    "a {colour} {shape} on {background}",
    "{colour} {shape}, {background} background",
    "a {background} background with a {colour} {shape}",
)
"""Captions that leave the size open."""
PARTIAL_CAPTIONS = (
    "a {colour} {shape}",
    "a {size} {colour} {shape}",
    "a {shape} on a {background} background",
    "a {background} background",
)
"""Captions that leave more open."""

_SYNONYMS = {
    "small": ("small", "small", "small", "little", "tiny"),
    "large": ("large", "large", "large", "big", "huge"),
}


def say(template: str, scene: Scene) -> str:
    """Fill a caption template, with "an" where English wants it."""
    words = template.format(**vars(scene))
    return f" {words}".replace(" a orange", " an orange").strip()


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe a scene in one of many ways, some of which leave the size or more open."""
    kind = rng.random()
    templates = FULL_CAPTIONS if kind < 0.75 else SIZELESS_CAPTIONS if kind < 0.93 else PARTIAL_CAPTIONS
    words = Scene(scene.background, scene.colour, scene.shape, rng.choice(_SYNONYMS[scene.size]))
    return say(rng.choice(templates), words)
