"""The demo: bundled prompts through the built-in model on two cards of this machine, and a sheet to look at."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.driver.result import RunResult
from gaudi_batch.driver.runner import run
from gaudi_batch.errors import InputError
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.redaction import redacted_options
from gaudi_batch.storage.store import Storage

PROMPTS = Path(__file__).resolve().parent.parent / "models" / "demo_prompts.parquet"
MODEL = "builtin:shapes"
SHEET = "contact_sheet.png"
COLUMNS = 10
CELL = 128
"""Side of a picture on the sheet, in pixels."""
CAPTION = 42
"""Height of the three lines under it."""
MARGIN = 8


def demo(output: str, prompts: int) -> RunResult:
    """Runs the demo job, afresh each time, and puts `contact_sheet.png` beside its images. It stays on this machine,
    whatever RAY_ADDRESS says, unless this process is connected to a Ray already.

    Args:
        output: where to; a path, or a URL of a store.
        prompts: how many of the bundled prompts.

    Raises:
        InputError: another run is in the output, which is not the demo's to remove.
    """
    storage = Storage(output)
    config = JobConfig.load(
        None,
        {
            "prompts": str(PROMPTS),
            "output": output,
            "model": MODEL,
            "device": "cpu",
            "cards": 2,
            "steps": 20,
            "guidance_scale": 3.0,
            "limit": prompts,
        },
    )
    _refuse_another_run(OutputReader(storage), config)
    result = run(config, address="local", overwrite=True)
    make_contact_sheet(storage)
    return result


def _refuse_another_run(ledger: OutputReader, config: JobConfig) -> None:
    try:
        record = ledger.run()
    except InputError:  # it can't be read, so nobody knows whose it is
        record = None
    wanted = redacted_options(config.model_dump(mode="json", exclude={"output", "limit", "shard_size"}))
    if ledger.holds_run() and not (record and _agrees(record.job, wanted)):
        raise InputError(
            f"{ledger.storage.url} has a run that is not the demo's, and the demo would remove it to start afresh; name"
            " another output with --output"
        )


def _agrees(stored: Any, wanted: Any) -> bool:
    """Whether a recorded job has our values; a field that it lacks is newer than the version that recorded it."""
    if isinstance(wanted, dict) and isinstance(stored, dict):
        return all(_agrees(stored.get(name, value), value) for name, value in wanted.items())
    return bool(stored == wanted)


def make_contact_sheet(storage: Storage) -> None:
    """Draws the images of a finished run with their prompts under them, in order of their rows."""
    table = pq.read_table(
        io.BytesIO(storage.get("manifest.parquet") or b""), columns=["row", "status", "prompt", "path"]
    )
    made = sorted((row for row in table.to_pylist() if row["status"] == "ok"), key=lambda row: row["row"])
    width, height = CELL + MARGIN, CELL + CAPTION + MARGIN
    lines = -(-len(made) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, max(1, lines) * height + MARGIN), "#f4f4f4")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for place, row in enumerate(made):
        x, y = MARGIN + place % COLUMNS * width, MARGIN + place // COLUMNS * height
        picture = Image.open(io.BytesIO(storage.get(row["path"]) or b"")).resize((CELL, CELL), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        caption = "\n".join(textwrap.wrap(row["prompt"], 22)[:3])
        draw.multiline_text((x, y + CELL + 1), caption, fill="black", font=font, spacing=1)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    storage.put(SHEET, buffer.getvalue())
