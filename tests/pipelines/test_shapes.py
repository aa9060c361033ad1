"""The synthetic pictures and their judge: every drawn picture is judged right, and nothing else gets a verdict."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tools.shapes.judge import COLOUR_TOLERANCE, NoVerdict, examine, judge, judge_colours
from tools.shapes.pictures import ALL_SCENES, COLOURS, FULL_CAPTIONS, SIDE, Scene, caption, coverage, draw, paint, say

A_SCENE = Scene("blue", "red", "circle", "large")


def test_scenes_are_every_combination_of_two_different_colours() -> None:
    assert len(ALL_SCENES) == len(set(ALL_SCENES)) == 8 * 7 * 4 * 2


RADIUS = {"small": (9.5, 12.5), "large": (20.0, 23.5)}
REACH = {"small": 13, "large": 5}
"""How far from the middle, in pixels, a shape of each size may sit without touching the border."""


def _anywhere(scene: Scene, seed: int) -> tuple[Image.Image, float, float, float]:
    """A picture with its shape off the training's places, and where that is: x, y, radius."""
    rng = random.Random(seed)
    x, y = (SIDE / 2 + rng.uniform(-1, 1) * REACH[scene.size] for _ in range(2))
    radius = rng.uniform(*RADIUS[scene.size])
    return paint(scene, x, y, radius, rng), x, y, radius


@pytest.mark.parametrize("background", COLOURS)
def test_every_drawn_picture_is_judged_right(background: str) -> None:
    scenes = [scene for scene in ALL_SCENES if scene.background == background]
    for scene in scenes:
        assert judge(draw(scene, random.Random(0))) == scene
        assert judge(_anywhere(scene, seed=1)[0]) == scene


def test_picture_follows_from_its_seed() -> None:
    pictures = [np.asarray(draw(A_SCENE, random.Random(seed))) for seed in (1, 1, 2)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_shapes_are_found_where_they_are_drawn() -> None:
    for seed, scene in enumerate(ALL_SCENES[::7]):
        picture, x, y, radius = _anywhere(scene, seed)
        seen = examine(picture)
        assert (seen.x, seen.y, seen.radius) == pytest.approx((x, y, radius), abs=0.5)


def test_larger_pictures_are_judged_by_their_shorter_side() -> None:
    picture = draw(A_SCENE, random.Random(0)).resize((256, 256), Image.Resampling.BICUBIC)
    assert judge(picture) == A_SCENE


def test_slight_flaws_do_not_matter() -> None:
    picture = np.asarray(draw(A_SCENE, random.Random(0))).astype(int)
    grain = np.random.default_rng(0).normal(0, 6, picture.shape)
    assert judge(_image(picture + grain)) == A_SCENE
    assert judge(draw(A_SCENE, random.Random(0)).filter(ImageFilter.GaussianBlur(0.7))) == A_SCENE


def test_captions_name_what_they_show() -> None:
    scene = Scene("orange", "white", "star", "small")
    for template in FULL_CAPTIONS:
        text = say(template, scene)
        assert all(word in text for word in ("orange", "white", "star", "small"))
        assert "a orange" not in text
    assert len({caption(scene, random.Random(seed)) for seed in range(200)}) > 15


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _two_shapes(second: str) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), COLOURS["blue"])
    for x, colour in ((16, "red"), (48, second)):
        picture.paste(COLOURS[colour], (0, 0, SIDE, SIDE), coverage("circle", x, 32, 10))
    return picture


def _half_drawn(shape: str, size: str) -> Image.Image:
    picture = draw(Scene("white", "purple", shape, size), random.Random(5))
    seen = examine(picture)
    picture.paste(COLOURS["white"], (round(seen.x), 0, SIDE, SIDE))
    return picture


def _of_radius(radius: float) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), COLOURS["yellow"])
    picture.paste(COLOURS["black"], (0, 0, SIDE, SIDE), coverage("square", 32, 32, radius))
    return picture


def _ring() -> Image.Image:
    picture = draw(A_SCENE, random.Random(0))
    seen = examine(picture)
    picture.paste(COLOURS["blue"], (0, 0, SIDE, SIDE), coverage("circle", seen.x, seen.y, 8))
    return picture


def _gradient() -> Image.Image:
    ramp = np.linspace(0, 255, SIDE)
    return _image(np.stack([np.broadcast_to(ramp, (SIDE, SIDE))] * 3, axis=-1))


def _noise(seed: int, blur: float) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3))
    blurred = _image(pixels).filter(ImageFilter.GaussianBlur(blur))
    levels = np.asarray(blurred).astype(float)
    return _image((levels - levels.mean()) / levels.std() * 80 + 128)


REFUSED = {
    "black": Image.new("RGB", (SIDE, SIDE)),
    "white": Image.new("RGB", (SIDE, SIDE), (255, 255, 255)),
    "flat grey": Image.new("RGB", (SIDE, SIDE), (128, 128, 128)),
    "gradient": _gradient(),
    "two shapes": _two_shapes("red"),
    "two shapes of two colours": _two_shapes("white"),
    "ring": _ring(),
    "between the sizes": _of_radius(16),
    "a speck": _of_radius(4),
    "blurred": draw(A_SCENE, random.Random(0)).filter(ImageFilter.GaussianBlur(5)),
    "negligible contrast": _image(np.asarray(draw(A_SCENE, random.Random(0))) // 10 + 12),
    "tiny": draw(A_SCENE, random.Random(0)).resize((8, 8)),
    **{f"noise {seed} blurred by {blur}": _noise(seed, blur) for seed in range(5) for blur in (0, 1, 3, 8, 15)},
    **{f"half a {size} {shape}": _half_drawn(shape, size) for shape in ("circle", "square", "triangle", "star")
       for size in ("small", "large")},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_gets_no_verdict(name: str) -> None:
    with pytest.raises(NoVerdict):
        judge(REFUSED[name])


def test_colours_can_be_told_where_the_outline_cannot() -> None:
    assert judge_colours(_of_radius(16)) == ("yellow", "black")
    assert judge_colours(_half_drawn("star", "large")) == ("white", "purple")
    for name in ("black", "flat grey", "gradient", "two shapes of two colours", "noise 0 blurred by 3"):
        with pytest.raises(NoVerdict):
            judge_colours(REFUSED[name])


def test_shape_that_leaves_the_picture_gets_no_verdict() -> None:
    picture = Image.new("RGB", (SIDE, SIDE), COLOURS["green"])
    picture.paste(COLOURS["white"], (0, 0, SIDE, SIDE), coverage("circle", 4, 32, 11))
    with pytest.raises(NoVerdict):
        judge(picture)


def test_shape_of_a_colour_between_two_gets_no_verdict() -> None:
    picture = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))
    picture.paste(COLOURS["white"], (0, 0, SIDE, SIDE), coverage("circle", 32, 32, 11))
    with pytest.raises(NoVerdict, match="none of the eight"):
        judge(picture)


def test_no_two_colours_can_be_taken_for_each_other() -> None:
    for one, other in itertools.combinations(COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(one, other)) > 1.9 * COLOUR_TOLERANCE
