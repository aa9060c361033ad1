"""The pictures that the training sees, and the combinations that it never sees."""

from __future__ import annotations

import random

import numpy as np

from tools.shapes.pictures import ALL_SCENES, SIDE, Scene, draw

HELD_OUT = 32
"""How many combinations each of the two held-out sets has, of 448 in all."""


def split(seed: int) -> tuple[list[Scene], list[Scene], list[Scene]]:
    """Divide all scenes into those to train on, those to tune by, and those to test with."""
    scenes = list(ALL_SCENES)
    random.Random(seed).shuffle(scenes)
    return scenes[2 * HELD_OUT :], scenes[HELD_OUT : 2 * HELD_OUT], scenes[:HELD_OUT]


def make_pictures(scenes: list[Scene], count: int, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """Draw pictures, each scene as often as any other.

    Args:
        scenes: what may be drawn.
        count: how many pictures.
        seed: positions, exact sizes and exact colours follow from it.

    Returns:
        The pictures as bytes of shape (count, 64, 64, 3), and what each of them shows.
    """
    shown = [scenes[i % len(scenes)] for i in range(count)]
    pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for i, scene in enumerate(shown):
        pictures[i] = np.asarray(draw(scene, random.Random(f"{seed}/{i}")))
    return pictures, shown
