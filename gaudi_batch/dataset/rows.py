"""One row of the prompt dataset: the bounds of what it may ask for, its defaults, and its images' seeds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gaudi_batch.config.bounds import MAX_IMAGES, MAX_INT32, MAX_SEED, Bounds
from gaudi_batch.plan import Bucket

SHAPE_COLUMNS = ("width", "height", "steps", "guidance_scale", "num_images")
"""The columns that decide a row's bucket and its number of images."""


@dataclass(frozen=True)
class RowRules:
    """A row's defaults, and what it may ask for."""

    bucket: Bucket
    """The job's own bucket. A row that can't be run is recorded in a shard of this bucket."""
    num_images: int
    negative_prompt: str | None
    multiple: int
    """The sides of an image must be multiples of this, in pixels."""

    bounds: Bounds | None = None
    """None in a run that a version without bounds began, which is finished without them."""
    takes_negative: bool = True
    """Whether the model takes negative prompts."""
    takes_guidance: bool = True
    """Whether the model takes a guidance scale over 1."""

    def shape(self, values: Mapping[str, Any]) -> tuple[Bucket, int, str | None]:
        """The bucket of a row, its number of images, and why it can't be run (None if it can).

        Args:
            values: the row's values of SHAPE_COLUMNS; a missing or null one is the job's.
        """
        accepted, errors = self._asked(values)
        if errors:
            return self.bucket, 0, errors[0]
        images = accepted.pop("num_images")
        return Bucket(**accepted), images, None

    def asked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a row in SHAPE_COLUMNS, as far as they are allowed."""
        return self._asked(values)[0]

    def _asked(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        job, bounds = self.bucket, self.bounds
        most_side, most_steps = (bounds.max_side, bounds.max_steps) if bounds else (MAX_INT32, MAX_INT32)
        most_guidance = bounds.max_guidance_scale if bounds else math.inf
        accepted: dict[str, Any] = {}
        errors: list[str] = []
        for name, read in (
            ("width", lambda: _side(values, "width", job.width, self.multiple, most_side)),
            ("height", lambda: _side(values, "height", job.height, self.multiple, most_side)),
            ("steps", lambda: _count(values, "steps", job.steps, most_steps)),
            ("num_images", lambda: _count(values, "num_images", self.num_images, MAX_IMAGES)),
            ("guidance_scale", lambda: _guidance(values, job.guidance_scale, most_guidance, self.takes_guidance)),
        ):
            try:
                accepted[name] = read()
            except ValueError as error:
                errors.append(str(error))
        if bounds and (pixels := accepted.get("width", 0) * accepted.get("height", 0)) > bounds.max_pixels:
            width, height = accepted.pop("width"), accepted.pop("height")
            errors.append(
                f"width x height is {width}x{height}, {pixels} pixels; it must be at most {bounds.max_pixels}{_RAISES}"
            )
        return accepted, errors


@dataclass(frozen=True)
class PromptRow:
    """A row of the dataset, as a card sees it."""

    row: int
    """Its number over all files in sorted order, by which everything refers to it."""
    id: str
    prompt: str
    negative_prompt: str
    seed: int | None
    bucket: Bucket
    num_images: int
    error: str | None
    """Why it can't be run; None if it can."""
    unreadable: bool = False
    """Whether the reason is that it could not be read."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """If its shape is against the rules: the offending values, by the names of SHAPE_COLUMNS."""
    has_seed: bool = True
    """Whether the seeds of its images are known, although it can't be run."""


def image_seed(run_seed: int, row: PromptRow, image: int) -> int:
    """The seed of one image, 0 .. 2^63 - 1.

    It is the row's own seed plus the image's number, else the first 8 bytes (big endian) of SHA-256 over the compact
    JSON of [run seed, id, image number], cut to 63 bits. It depends on nothing that a crash or another number of cards
    could change.
    """
    if row.seed is not None:
        return (row.seed + image) & MAX_SEED
    return derived_seed(run_seed, row.id, image)


def derived_seed(run_seed: int, identity: str, image: int) -> int:
    """The seed of an image of a row without a seed of its own; see `image_seed`."""
    text = json.dumps([run_seed, identity, image], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") & MAX_SEED


_RAISES = ", unless the job's max_pixels says otherwise"


class Undecodable(str):
    """A value that Python can't hold, such as text that is not UTF-8, in the nearest readable form."""


def make_row(number: int, values: Mapping[str, Any], rules: RowRules, error: str | None = None) -> PromptRow:
    """Applies the rules to one row.

    Args:
        number: the row's number over all files.
        values: its values under our column names; a missing or null one is the job's.
        rules: the rules.
        error: why the row can't be read, if it can't.
    """
    bucket, images, shape_error = rules.shape(values)
    prompt, prompt_error = _text(values, "prompt")
    negative, negative_error = _text(values, "negative_prompt")
    identity, id_error = _text(values, "id")
    seed, seed_error = _seed(values)
    unreadable = error is not None
    error = error or prompt_error or negative_error or id_error or shape_error or seed_error
    if error is None and (prompt is None or not prompt.strip()):
        error = "prompt is null" if prompt is None else "prompt is empty"
    if negative and negative.strip() and not rules.takes_negative:
        error = error or "negative_prompt is given; this model takes none"
    if rules.bounds is not None:
        most = rules.bounds.max_prompt
        error = error or _too_long("prompt", prompt, most) or _too_long("negative_prompt", negative, most)
        prompt, negative = prompt and prompt[:most], negative and negative[:most]
    return PromptRow(
        row=number,
        id=str(number) if identity is None else identity,
        prompt=prompt or "",
        negative_prompt=(rules.negative_prompt if negative is None else negative) or "",
        seed=seed,
        bucket=bucket,
        num_images=images,
        error=error,
        unreadable=unreadable,
        asked=rules.asked(values) if shape_error and rules.bounds is not None else {},
        has_seed=seed is not None or (rules.bounds is not None and seed_error is None and id_error is None),
    )


def _too_long(name: str, text: str | None, most: int) -> str | None:
    if text is None or len(text) <= most:
        return None
    return f"{name} has {len(text)} characters; it must have at most {most}, and no model reads as many"


def _text(values: Mapping[str, Any], name: str) -> tuple[str | None, str | None]:
    value = values.get(name)
    if isinstance(value, Undecodable):
        return str(value), f"{name} can't be read as text: {str(value)!r:.80}"
    if value is None or isinstance(value, str):
        return value, None
    if name == "id":
        return str(value), None
    return None, f"{name} is {value!r:.80}; it must be a string"


def _integer(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    # Data frames make floats of a column of whole numbers with a gap, so 512.0 counts as a whole number.
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        raise ValueError(f"{name} is {_short(value)}; it must be a whole number")
    return int(value)


def _count(values: Mapping[str, Any], name: str, default: int, most: int = MAX_INT32) -> int:
    value = _integer(values, name)
    if value is None:
        return default
    if not 1 <= value <= most:
        raise ValueError(f"{name} is {value}; it must be at least 1 and at most {most}")
    return value


def _side(values: Mapping[str, Any], name: str, default: int, multiple: int, most: int) -> int:
    value = _count(values, name, default)
    if value > most:
        raise ValueError(f"{name} is {value}; it must be at most {most}{_RAISES}")
    if value % multiple:
        raise ValueError(f"{name} is {value}; this model needs a multiple of {multiple}")
    return value


def _guidance(values: Mapping[str, Any], default: float, most: float, taken: bool) -> float:
    value = values.get("guidance_scale")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"guidance_scale is {_short(value)}; it must be a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"guidance_scale is {value}; it must be finite and not negative")
    if value > most:
        raise ValueError(f"guidance_scale is {value}; it must be at most {most:g}")
    if value > 1 and not taken:
        raise ValueError(f"guidance_scale is {value}; this model takes none, and so 1 at most")
    return float(value)


def _seed(values: Mapping[str, Any]) -> tuple[int | None, str | None]:
    try:
        seed = _integer(values, "seed")
    except ValueError as error:
        return None, str(error)
    if seed is not None and not 0 <= seed <= MAX_SEED:
        return None, f"seed is {seed}; it must be in 0 .. {MAX_SEED}"
    return seed, None


def _short(value: Any) -> str:
    return f"{value!r:.80}"
