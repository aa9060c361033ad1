"""Says what a picture shows, from its pixels alone.

A picture of one coloured shape on a coloured background is a blend of two colours. The judge finds the two, works out
how much of each pixel the shape covers, and compares that with the four shapes drawn at the same place and area.
Whatever does not fit (a third colour, a second piece, an edge too soft, an outline between two shapes, a size between
the two) gets no verdict: a judge that always finds something would find it in noise too.
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.shapes.pictures import COLOURS, SHAPES, SIDE, SIZES, Scene, coverage

COLOUR_TOLERANCE = 50.0
"""Farthest that a colour may be from one of the eight, in RGB units of 0 to 255; the nearest two are 97 apart."""
SIZE_LIMITS = {"small": (7.5, 14.0), "large": (17.5, 27.0)}
"""Radii that count as a size, in pixels of a picture of 64 x 64; what lies between has no size."""
MIN_OVERLAP = 0.88
"""Least overlap (intersection over union) of what is seen with the shape that it is taken for."""
MIN_LEAD = 0.04
"""By how much that overlap must exceed those with the other shapes."""
MAX_FOREIGN = 0.02
"""Largest share of pixels that are no blend of the two colours."""
MAX_STRAY = 0.04
"""Largest area outside of the shape's one piece, or missing inside, as a share of the shape's."""


class NoVerdict(ValueError):
    """The picture is not clearly one of the known shapes on a plain background; the message says why."""


@dataclass(frozen=True)
class Evidence:
    """A verdict with what led to it."""

    scene: Scene
    x: float
    y: float
    radius: float
    overlap: float


def judge(image: Image.Image) -> Scene:
    """Say what a picture shows.

    Args:
        image: of any mode and any size from 16 x 16; shapes are measured relative to the shorter side.

    Returns:
        Background colour, shape colour, shape and size.

    Raises:
        NoVerdict: if the picture is not clearly one shape on a plain background.
    """
    return examine(image).scene


def judge_colours(image: Image.Image) -> tuple[str, str]:
    """Say of which two colours a picture is, whatever the outline between them.

    Args:
        image: as for `judge`.

    Returns:
        Background colour and shape colour.

    Raises:
        NoVerdict: if the picture is not of two of the colours, with a plain border.
    """
    background, colour, _ = _find_colours(image)
    return background, colour


def examine(image: Image.Image) -> Evidence:
    """Say what a picture shows, and where and how clearly; see `judge`."""
    background, colour, cover = _find_colours(image)
    _require_one_piece(cover > 0.5)
    _require_sharp_edge(cover)
    shape, x, y, radius, overlap = _find_shape(cover)
    relative = radius * SIDE / min(image.size)
    for size in SIZES:
        if SIZE_LIMITS[size][0] <= relative <= SIZE_LIMITS[size][1]:
            return Evidence(Scene(background, colour, shape, size), x, y, radius, overlap)
    raise NoVerdict(f"a radius of {relative:.1f} pixels is no size")


def _find_colours(image: Image.Image) -> tuple[str, str, np.ndarray]:
    """Names of the two colours, and how much of each pixel the second covers."""
    if min(image.size) < 16:
        raise NoVerdict(f"{image.width} x {image.height} pixels are too few")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    ground, background = _find_background(pixels)
    paint, colour = _find_paint(pixels, ground)
    if colour == background:
        raise NoVerdict(f"shape and background are both {colour}")
    return background, colour, _find_cover(pixels, ground, paint)


def _name(colour: np.ndarray) -> str:
    distances = {name: float(np.linalg.norm(colour - rgb)) for name, rgb in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    if distances[nearest] > COLOUR_TOLERANCE:
        raise NoVerdict(f"the colour {tuple(int(c) for c in colour)} is none of the eight")
    return nearest


def _find_background(pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """The frame's colour and name; a shape never reaches the frame, so it must be plain."""
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    frame = np.concatenate([frame, pixels[2:-2, :2].reshape(-1, 3), pixels[2:-2, -2:].reshape(-1, 3)])
    ground = np.median(frame, axis=0)
    if np.mean(np.linalg.norm(frame - ground, axis=1) > COLOUR_TOLERANCE) > 0.03:
        raise NoVerdict("the border is not of one colour")
    return ground, _name(ground)


def _find_paint(pixels: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, str]:
    """The shape's colour and name: the median of what stands out from the background."""
    distance = np.linalg.norm(pixels - ground, axis=2)
    standing_out = distance > COLOUR_TOLERANCE
    if standing_out.mean() < 0.015:
        raise NoVerdict("nothing stands out from the background")
    # Pixels at the edge are blends, and a small shape has many: the median is taken over the purer half.
    purer = distance >= np.median(distance[standing_out])
    paint = np.median(pixels[purer], axis=0)
    return paint, _name(paint)


def _find_cover(pixels: np.ndarray, ground: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1; every pixel must be a blend of the two colours."""
    line = paint - ground
    cover: np.ndarray = np.clip((pixels - ground) @ line / (line @ line), 0.0, 1.0)
    rest = np.linalg.norm(pixels - ground - cover[..., None] * line, axis=2)
    foreign = float(np.mean(rest > COLOUR_TOLERANCE))
    if foreign > MAX_FOREIGN:
        raise NoVerdict(f"{foreign:.0%} of the picture is of a third colour")
    return cover


def _pieces(mask: np.ndarray) -> list[int]:
    """Areas of the connected pieces of a mask, largest first; neighbours share an edge."""
    left = mask.copy()
    areas = []
    while left.any():
        start = np.unravel_index(int(np.argmax(left)), left.shape)
        left[start] = False
        queue = deque([(int(start[0]), int(start[1]))])
        area = 0
        while queue:
            row, column = queue.popleft()
            area += 1
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= r < left.shape[0] and 0 <= c < left.shape[1] and left[r, c]:
                    left[r, c] = False
                    queue.append((r, c))
        areas.append(area)
    return sorted(areas, reverse=True)


def _require_one_piece(mask: np.ndarray) -> None:
    inside, outside = _pieces(mask), _pieces(~mask)
    if not inside:
        raise NoVerdict("there is no shape")
    allowed = MAX_STRAY * inside[0]
    if sum(inside[1:]) > allowed:
        raise NoVerdict("the shape is in pieces, or there are several")
    if sum(outside[1:]) > allowed:
        raise NoVerdict("the shape has holes")


def _require_sharp_edge(cover: np.ndarray) -> None:
    """A drawn edge is about one pixel wide; allow two, and as many times more in a picture made larger."""
    mask = cover > 0.5
    edge = int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
    soft = int(((cover > 0.2) & (cover < 0.8)).sum())
    if soft > 2 * edge * max(1.0, min(cover.shape) / SIDE):
        raise NoVerdict("the edge is blurred")


def _find_shape(cover: np.ndarray) -> tuple[str, float, float, float, float]:
    """The shape whose drawing fits best: its name, centre, radius and overlap."""
    height, width = cover.shape
    # Faint haze far from the shape would move its centre.
    cover = np.where(cover > 0.15, cover, 0.0)
    area = float(cover.sum())
    x = float((cover.sum(0) * (np.arange(width) + 0.5)).sum() / area)
    y = float((cover.sum(1) * (np.arange(height) + 0.5)).sum() / area)
    fits = []
    for shape in SHAPES:
        radius = float(np.sqrt(area / _UNIT_AREA[shape]))
        drawn = np.asarray(coverage(shape, x, y, radius, width, height), dtype=np.float64) / 255
        overlap = float(np.minimum(cover, drawn).sum() / np.maximum(cover, drawn).sum())
        fits.append((overlap, shape, radius))
    fits.sort(reverse=True)
    overlap, shape, radius = fits[0]
    if overlap < MIN_OVERLAP:
        raise NoVerdict(f"the outline fits no shape; {shape} is nearest with {overlap:.2f}")
    if overlap - fits[1][0] < MIN_LEAD:
        raise NoVerdict(f"the outline lies between {shape} and {fits[1][1]}")
    return shape, x, y, radius, overlap


def _unit_area(shape: str) -> float:
    drawn = np.asarray(coverage(shape, 128, 128, 64, 256, 256), dtype=np.float64)
    return float(drawn.sum() / 255 / 64**2)


_UNIT_AREA = {shape: _unit_area(shape) for shape in SHAPES}
"""Area of each shape of radius 1."""


def main() -> None:
    """Judge files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.shapes.judge", description=main.__doc__)
    parser.add_argument("images", nargs="+", type=Path)
    for path in parser.parse_args().images:
        try:
            scene = judge(Image.open(path))
            print(f"{path}: a {scene.size} {scene.colour} {scene.shape} on a {scene.background} background")
        except NoVerdict as reason:
            print(f"{path}: no verdict, {reason}")


if __name__ == "__main__":
    main()
