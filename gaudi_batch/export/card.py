"""The dataset card of an export: README.md as Hugging Face's hub reads it, with a grid of pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from PIL import Image

from gaudi_batch.dataset.reasons import Reasons
from gaudi_batch.export.export import ASSETS, CARD, Export, put_if_new, some_images
from gaudi_batch.export.licence import licence_of
from gaudi_batch.export.selection import REST, Splits
from gaudi_batch.export.source import read_images
from gaudi_batch.output.formats.loadable import loadable
from gaudi_batch.output.manifest import FILES
from gaudi_batch.text import counted, one_line

GRID = f"{ASSETS}/grid.jpg"
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
MAX_FILTER = 5000
"""Characters of a filter that are shown."""
SHA256_DIGITS = 64
"""Of the revision of a directory; that of a hub's model has fewer."""
JSON_TYPES = (
    (pa.types.is_null, "null"),
    (pa.types.is_boolean, "bool"),
    (pa.types.is_uint64, "uint64"),
    (pa.types.is_integer, "int64"),
    (pa.types.is_floating, "float64"),
    (pa.types.is_duration, "float64"),
)
"""What values of each type are in JSON, as `datasets` names it; of all others texts."""
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
    revision = str(fingerprint.get("model_revision") or "")
    model = _model_shown(name, revision)
    present = _rows(export.rows)
    made = export.rows.filter(pc.is_valid(export.rows["path"]))
    contents = []
    if len(made):
        contents.append(f"{counted(len(made), 'image')} of {counted(_rows(made), 'prompt')}")
    if failed := len(export.rows) - len(made):
        contents.append(f"{counted(failed, 'failed row')} without an image")
    lines = [
        "---",
        yaml.safe_dump(_front_matter(export), sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {counted(len(made), 'image') if len(made) else counted(failed, 'failed row')} by {_code(model)}",
        "",
        f"{', and '.join(contents)}, made by gaudi-batch {info.versions.get('gaudi-batch', '')}".rstrip()
        + (
            "."
            if export.run.is_complete
            else f" in a run that was not complete: {present} of {info.rows} rows are here."
        ),
        "",
    ]
    if prompts:
        lines += [f"![Some of the images]({GRID})", "", "From left to right, line by line:", ""]
        lines += [f"{number}. {_code(prompt)}" for number, prompt in enumerate(prompts, 1)]
        lines.append("")
    lines += ["## How to load it", "", *_how_to_load(export), "## How it was made", ""]
    lines.append(f"- Model: {_code(model)}" + (f", revision {_code(revision)}" if revision else ""))
    storage = export.run.reader.storage
    same_store = "://" in name and storage.place.startswith(name.partition("://")[0] + "://")
    licence = licence_of(job, fingerprint, storage.options if same_store else {})
    lines.append(
        f"- Licence of the model: {_code(licence)}" if licence else "- Licence of the model: its files say none"
    )
    for lora in fingerprint.get("lora", []):
        path = _model_shown(str(lora.get("path", "")), str(lora.get("revision") or ""))
        parts = [path, lora.get("weight_name"), f"scale {lora.get('scale', 1)}"]
        lines.append("- LoRA: " + ", ".join(_code(part) for part in parts if part))
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
    lines += ["", *_selection(export), *_failures(export)]
    return "\n".join(lines)


def _front_matter(export: Export) -> dict[str, Any]:
    size = next((name for most, name in SIZE_CATEGORIES if len(export.rows) < most), "n>1B")
    pattern = "{split}/**" if export.format == FILES else "data/{split}-*"
    features = _features(export) if export.format == "webdataset" else None
    return {
        **({"dataset_info": {"features": features}} if features else {}),
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


def _features(export: Export) -> list[dict[str, Any]]:
    """The types of a sample as `datasets` writes them: else it would take those of the first five samples, and fail at
    the first value of a column that has none there."""
    described = loadable(export.tasks[0].described.slice(0, 0))
    fields = [{"name": field.name, **_feature(field.type)} for field in described.schema]
    suffix = export.tasks[0].names[0].rpartition(".")[2]
    image = [{"name": suffix, "dtype": "image"}] if any(image for task in export.tasks for image in task.images) else []
    texts = [{"name": name, "dtype": "string"} for name in ("__key__", "__url__")]
    return [*image, {"name": "json", "struct": fields}, *texts]


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A type of JSON as `datasets` writes it."""
    if pa.types.is_struct(kind):
        return {"struct": [{"name": field.name, **_feature(field.type)} for field in kind]}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _feature(kind.value_type)
        return {"list": inner if "list" in inner else inner.get("struct") or inner["dtype"]}
    return {"dtype": next((name for is_kind, name in JSON_TYPES if is_kind(kind)), "string")}


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


def _rows(images: pa.Table) -> int:
    """Of how many rows of the prompts they are."""
    return pc.count_distinct(images["row"]).as_py()  # type: ignore[no-any-return]


def _selection(export: Export) -> list[str]:
    """How its rows were chosen and split."""
    lines = []
    if export.filters:
        filters = ", ".join(_code(text, MAX_FILTER) for text in export.filters)
        lines += [f"Of the run's rows it has those that pass all filters: {filters}.", ""]
    if export.split is not None:
        splits = Splits(export.split, export.rows.column_names)
        if splits.shares:
            told, has_rest = f"by a hash of each row's id: {_code(export.split)}", splits.has_rest
            rest = "has what no share takes" + (", too" if REST in dict(splits.shares) else "")
        else:
            told, has_rest = f"the values of the column {_code(export.split)}", export.rows[export.split].null_count > 0
            rest = "has the rows without one"
        lines += [f"Splits are {told}{f'; `{REST}` {rest}' if has_rest else ''}.", ""]
    return lines


def _failures(export: Export) -> list[str]:
    failed = export.failures
    if not len(failed):
        return ["No row of the run had failed when this was exported.", ""]
    reasons = Reasons()
    for identity, error in zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True):
        reasons.add(error or "", identity)
    here = pc.sum(pc.equal(export.rows["status"], "failed")).as_py()
    told = f"{counted(len(failed), 'row')} of the run failed"
    if not here:
        told += f" and {'is' if len(failed) == 1 else 'are'} not in the set:"
    elif here == len(failed):
        told += f"; {'it is' if here == 1 else 'they are'} in the set, without an image:"
    else:
        told += f"; {here} of them {'is' if here == 1 else 'are'} in the set, without an image:"
    lines = [told, ""]
    lines += [f"- {counted(reason['rows'], 'row')}: {_code(reason['reason'])}" for reason in reasons.describe()]
    return [*lines, ""]


def _stack(stacks: Sequence[Mapping[str, str]] | None, versions: Mapping[str, str]) -> Mapping[str, str]:
    """The packages and cards that made the images, as the cards say, else as the driver does."""
    return (stacks[-1] if stacks else {}) or versions


def _place_shown(place: str) -> str:
    """A URL as it is, of a local path the last part: the card may be seen by all."""
    is_url = "://" in place and not place.startswith(("file://", "local://"))
    return place if is_url else re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def _model_shown(name: str, revision: str) -> str:
    """The name of a model of the hub or of this package; of one on a disk, which is known by the SHA-256 of its files,
    the last part of its path."""
    is_named = len(revision) < SHA256_DIGITS and not name.startswith(("/", ".", "~"))
    return name if is_named or name.startswith("builtin:") else _place_shown(name)


def _code(value: object, most: int = 300) -> str:
    """A value in Markdown, as code in one line."""
    return f"`{one_line(value, most).replace('`', chr(39))}`"
