"""The dataset card of an export: README.md as Hugging Face's hub reads it, with a grid of pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from PIL import Image

from gaudi_batch.dataset.reasons import Reasons
from gaudi_batch.export.export import Export, put_if_new, some_images
from gaudi_batch.export.licence import licence_of
from gaudi_batch.export.source import read_images
from gaudi_batch.output.manifest import FILES
from gaudi_batch.text import counted, one_line

CARD = "README.md"
GRID = "assets/grid.jpg"
GRID_SIDE = 4
"""Pictures in a line of the grid, and lines."""
CELL = 256
"""Most pixels of a side of a picture in the grid."""
GAP = 4
"""Pixels between two pictures."""
SIZE_CATEGORIES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
)
"""The hub's names of sizes."""
SETTINGS = (
    "width",
    "height",
    "steps",
    "guidance_scale",
    "scheduler",
    "dtype",
    "seed",
    "num_images",
    "negative_prompt",
)
"""What the fingerprint of a run says that a reader of its images wants to know."""


def write_card(export: Export) -> None:
    """Writes the card and its grid.

    Raises:
        StorageError: storage failed, or an image is not what its manifest says.
    """
    images = some_images(export, GRID_SIDE**2)
    source = export.run.reader.storage
    written = {CARD: card(export, [prompt for _, prompt in images]).encode()}
    if images:
        written[GRID] = grid([data or b"" for data in read_images(source, [image for image, _ in images])])
    for path, data in written.items():
        put_if_new(export.target, path, data)


def grid(images: Sequence[bytes]) -> bytes:
    """Pictures side by side, none larger than CELL, as a JPEG file."""
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    for picture in pictures:
        picture.thumbnail((CELL, CELL))
    width, height = (max(side) for side in zip(*(picture.size for picture in pictures), strict=True))
    columns = min(GRID_SIDE, len(pictures))
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, lines * (height + GAP) - GAP), "white")
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * (width + GAP), place // columns * (height + GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def card(export: Export, prompts: Sequence[str]) -> str:
    """The text of the card.

    Args:
        export: what it is of.
        prompts: of the pictures in the grid; none if there is no grid.
    """
    info = export.run.info
    job, fingerprint = info.job, info.fingerprint
    name = str(fingerprint.get("model") or job.get("model") or "simulated")
    images = len(export.rows) - export.rows["path"].null_count
    rows = len(set(export.rows["row"].to_pylist()))
    lines = [
        "---",
        yaml.safe_dump(_front_matter(export), sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {counted(images, 'image')} by {_code(_model_shown(name))}",
        "",
        f"{counted(images, 'image')} of {counted(rows, 'prompt')}, made by gaudi-batch"
        f" {info.versions.get('gaudi-batch', '')}".rstrip()
        + ("." if export.run.is_complete else f" in a run that was not complete: {rows} of {info.rows} rows are here."),
        "",
    ]
    if prompts:
        lines += [f"![Some of the images]({GRID})", "", "From left to right, line by line:", ""]
        lines += [f"{number}. {_text(prompt)}" for number, prompt in enumerate(prompts, 1)]
        lines.append("")
    lines += ["## How to load it", "", *_how_to_load(export), "## How it was made", ""]
    lines += [
        f"- Model: {_code(_model_shown(name))}"
        + (f", revision {_code(revision)}" if (revision := fingerprint.get("model_revision")) else "")
    ]
    storage = export.run.reader.storage
    same_store = "://" in name and storage.place.startswith(name.partition("://")[0] + "://")
    licence = licence_of(job, fingerprint, storage.options if same_store else {})
    lines.append(
        f"- Licence of the model: {_text(licence)}" if licence else "- Licence of the model: its files say none"
    )
    for lora in fingerprint.get("lora", []):
        lines.append(f"- LoRA: {_code(one_line(lora, 200))}")
    lines.append(f"- Prompts: {_code(_place_shown(str(job.get('prompts', ''))))}, {counted(info.rows, 'row')}")
    for setting in SETTINGS:
        value = fingerprint.get(setting)
        if value not in (None, ""):
            lines.append(f"- {setting}: {_code(value)}")
    for package, version in _stack(info.stacks, info.versions).items():
        lines.append(f"- {package}: {_code(version)}")
    lines += ["", "Rows may have settings of their own, which stand beside each image.", ""]
    lines += ["## What it has", "", "| split | rows | objects |", "| --- | --- | --- |"]
    for split, count in export.splits.items():
        lines.append(f"| {split} | {count} | {sum(part.split == split for part in export.parts)} |")
    lines += ["", *_failures(export)]
    return "\n".join(lines)


def _front_matter(export: Export) -> dict[str, Any]:
    size = next((name for most, name in SIZE_CATEGORIES if len(export.rows) < most), "n>1B")
    pattern = "{split}/**" if export.format == FILES else "data/{split}-*"
    return {
        "task_categories": ["text-to-image"],
        "tags": ["synthetic", "text-to-image", "gaudi-batch"],
        "size_categories": [size],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": pattern.format(split=split)} for split in export.splits],
            }
        ],
    }


def _how_to_load(export: Export) -> list[str]:
    split = next(iter(export.splits))
    lines = [
        "```python",
        "import os",
        "",
        "from datasets import load_dataset",
        "",
        'dataset = load_dataset(os.getcwd())  # in this directory; from the hub, load_dataset("owner/name")',
        f'print(dataset["{split}"][0])',
        "```",
        "",
    ]
    if export.format == "webdataset":
        count = sum(part.split == split for part in export.parts)
        lines += [
            "```python",
            "import webdataset",
            "",
            f'urls = "data/{split}-{{00000..{count - 1:05d}}}-of-{count:05d}.tar"',
            'for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):',
            '    print(sample["__key__"], sample["json"]["prompt"])',
            "```",
            "",
        ]
    if export.format == "parquet":
        lines += [
            "```python",
            "import duckdb",
            "",
            f"print(duckdb.sql(\"select prompt, octet_length(image.bytes) from 'data/{split}-*.parquet' limit 5\"))",
            "```",
            "",
        ]
    return lines


def _failures(export: Export) -> list[str]:
    failed = export.failures
    if not len(failed):
        return ["No row of the run had failed when this was exported.", ""]
    reasons = Reasons()
    for identity, error in zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True):
        reasons.add(error or "", identity)
    lines = [f"{counted(len(failed), 'row')} of the run failed, and has no image:", ""]
    lines += [f"- {counted(reason['rows'], 'row')}: {_text(reason['reason'])}" for reason in reasons.describe()]
    return [*lines, ""]


def _stack(stacks: Sequence[Mapping[str, str]] | None, versions: Mapping[str, str]) -> Mapping[str, str]:
    """The packages and cards that made the images, as the cards say, else as the driver does."""
    return (stacks[-1] if stacks else {}) or versions


def _place_shown(place: str) -> str:
    """A URL as it is, of a local path the last part: the card may be seen by all."""
    return place if "://" in place else place.rstrip("/").rpartition("/")[2]


def _model_shown(name: str) -> str:
    return _place_shown(name) if name.startswith(("/", ".", "~")) else name


def _code(value: object) -> str:
    """A value in Markdown, as code in one line."""
    return f"`{one_line(value, 300).replace('`', chr(39))}`"


def _text(value: str) -> str:
    """A text that others have written in Markdown, as text alone."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&-])", r"\\\1", one_line(value, 300))
