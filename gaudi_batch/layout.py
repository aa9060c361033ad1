"""The names of a run's files. They come from numbers and attempts, never from user text."""

from __future__ import annotations

import re
from collections.abc import Iterable

STOP_FILE = "stop.json"
"""A request to a submitted job's driver to stop."""
VERIFYING_FILE = "verifying.json"
"""How far a verification has come that has not ended."""
EVENTS_FILE = "events.bin"
"""The event log of the last driver that did not complete the run."""
ROLLUPS = "rollup"
"""The directory of roll-ups."""
JOINED = "manifest.parquet"
"""All manifests of a complete run as one file, or as a directory of them where one would be too large."""
IMAGES = "images"
"""The directory of images, each an object of its own."""
DATA = "data"
"""The directory of objects that hold all images of a shard."""
METADATA = "metadata.parquet"
"""In `IMAGES` of a complete run: prompts and settings of its images, as loaders of image folders look for them."""
RECIPES = "recipes"
"""The directory of compiled recipes, which other runs may use, too, and which no run removes."""
RECIPE_SUFFIXES = (".recipe", ".metadata")
"""What the files in it end with."""
TIMELINE = "timeline"
"""The directory of what became of each card."""
REPORT_FILE = "report.html"
"""A run's report."""
DRIVER_NAME_LENGTH = 5
"""Letters of a driver's name, with which the names of its attempts begin."""
LOG = "log"
"""The directory of the log lines of each driver."""
OWN_FILES = (
    "plan.parquet",
    "progress.json",
    "summary.json",
    REPORT_FILE,
    "verify.json",
    JOINED,
    "run.json",
    STOP_FILE,
    EVENTS_FILE,
    VERIFYING_FILE,
)
"""Files that a run has once; it has manifests and files named after attempts beside these."""

_ATTEMPT = re.compile(r"(\d{6,})-([0-9a-z]+)(\.\w+)?")
_MANIFEST = re.compile(r"(\d{6,})\.parquet")
_OWN_NAMES = {
    ROLLUPS: re.compile(r"[a-z]{5}\d{6,}(\.index)?\.parquet"),
    TIMELINE: re.compile(r"[a-z]{5}-\d{6,}\.jsonl"),
    LOG: re.compile(r"[a-z]{5}-\d{6,}\.log"),
    JOINED: re.compile(r"[a-z]{5}\d{6,}\.parquet"),
}


def attempt_name(shard: int, attempt: str) -> str:
    """The name of every file of one attempt at a shard."""
    return f"{shard:06d}-{attempt}"


def parse_attempt(name: str) -> tuple[int, str] | None:
    """The shard and the attempt of an object or a directory, from its name."""
    match = _ATTEMPT.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def driver_of(attempt: str) -> str:
    """The driver that has named an attempt."""
    return attempt[:DRIVER_NAME_LENGTH]


def image_name(row: int, image: int, suffix: str) -> str:
    """The name of one image, which no other of its run has."""
    return f"{row:08d}-{image:02d}.{suffix}"


def image_path(shard: int, attempt: str, row: int, image: int, suffix: str) -> str:
    """One image of format `files`."""
    return f"{IMAGES}/{attempt_name(shard, attempt)}/{image_name(row, image, suffix)}"


def data_path(shard: int, attempt: str, suffix: str) -> str:
    """The object of one attempt at a shard, where that has all of its images."""
    return f"{DATA}/{attempt_name(shard, attempt)}.{suffix}"


def throughput_path(card: str, shard: int, attempt: str) -> str:
    """One attempt's throughput lines."""
    return f"throughput/{card}/{attempt_name(shard, attempt)}.jsonl"


def timeline_path(driver: str, number: int) -> str:
    """Some lines of what became of a driver's cards."""
    return f"{TIMELINE}/{driver}-{number:06d}.jsonl"


def log_path(driver: str, number: int) -> str:
    """A piece of a driver's log."""
    return f"{LOG}/{driver}-{number:06d}.log"


def drivers_of_timeline(names: Iterable[str]) -> set[str]:
    """The drivers of the names in `TIMELINE`."""
    return {name.partition("-")[0] for name in own_names(TIMELINE, names)}


def manifest_path(shard: int) -> str:
    """The manifest of a shard; the shard is committed when it appears."""
    return f"manifest/{shard:06d}.parquet"


def parse_manifest(name: str) -> int | None:
    """The shard that a manifest belongs to."""
    match = _MANIFEST.fullmatch(name)
    return int(match[1]) if match else None


def is_of_run(path: str) -> bool:
    """Whether a path in an output, or the output itself (""), is one that a run writes."""
    place, _, rest = path.partition("/")
    if place == IMAGES:
        return rest in ("", METADATA) or parse_attempt(rest.partition("/")[0]) is not None
    if place == DATA:
        return not rest or parse_attempt(rest) is not None
    if place == "manifest":
        return not rest or parse_manifest(rest) is not None
    if place == "throughput":
        return not rest or parse_attempt(rest.rpartition("/")[2]) is not None or "/" not in rest
    if place == RECIPES:
        return not rest or rest.endswith(RECIPE_SUFFIXES)
    if place in _OWN_NAMES:
        return not rest or _OWN_NAMES[place].fullmatch(rest) is not None
    return path in ("", "lease.json", *OWN_FILES)


def own_names(place: str, names: Iterable[str]) -> list[str]:
    """Those of the names in `ROLLUPS`, `TIMELINE`, `LOG` or `JOINED` that a run has given."""
    return [name for name in names if _OWN_NAMES[place].fullmatch(name)]
