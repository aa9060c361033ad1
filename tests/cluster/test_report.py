"""The report of a run says what its manifests say, shows what went wrong on which card, and is safe to open."""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Browser, Page, opened_browser
from helpers import called, read_manifest, wait_for_commits, wait_until
from PIL import Image

ROWS, SHARD, BATCH = 960, 8, 4
HOSTILE = [
    "</script><script>window.harm = 1</script>",
    '"><img src=x onerror="window.harm = 1">',
    "<!--<script>{{data}} \u2028 \u202e ]]>",
    "{{scripts}} ${window.harm = 1} \\u003cb\\u003e",
    "javascript:window.harm=1 \x00\x1b[31m",
]
HUNG = "(limits."
"""Of a process that stands still: in a batch or, rarely, between two."""
BAD = [31, 77, 401]
"""Rows for which the pipeline raises."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    """The output of a run with a slow card, one that hangs, one that hangs so late that a backup makes its shard, rows
    that fail, and prompts that would be markup."""
    directory = tmp_path_factory.mktemp("report")
    prompts = [HOSTILE[row % 40] if row % 40 < len(HOSTILE) else f"a picture of thing {row}" for row in range(ROWS)]
    table = pa.table({"prompt": prompts, "id": [f"thing-{row}" for row in range(ROWS)]})
    pq.write_table(table, directory / "prompts.parquet")
    output = directory / "out"
    fields = {
        "--batch-size": BATCH,
        "--shard-size": SHARD,
        "--device": "simulated",
        "--simulated.batch-seconds": 0.5,
        "--simulated.slow-modules": "[1]",
        "--simulated.slow-factor": 2.5,
        "--simulated.raise-rows": BAD,
        "--limits.batch": 16,
        "--limits.answer": 20,
    }
    flags = [str(part) for item in fields.items() for part in item]
    command = ["run", "--prompts", str(directory / "prompts.parquet"), "--output", str(output), *flags]
    driver = subprocess.Popen([sys.executable, "-m", "gaudi_batch", *command, "--address", cluster])
    # Each has made its first batch, which has a limit of its own.
    wait_until(lambda: len(pids(output)) == 4 or driver.poll() is not None)
    processes = pids(output)
    # As a driver of the device does that never returns.
    os.kill(processes[2], signal.SIGSTOP)
    wait_until(lambda: HUNG in (output / "progress.json").read_text())
    running = called("report", output, "--to", directory / "running.html")
    assert running.returncode == 0, running.stderr
    wait_for_commits(output, ROWS // SHARD - 12)
    os.kill(processes[3], signal.SIGSTOP)
    assert driver.wait(timeout=120) == 3
    return output


def pids(output: Path) -> dict[int, int]:
    """The processes of the cards that have stored an image, by their modules."""
    progress = json.loads((output / "progress.json").read_text()) if (output / "progress.json").exists() else {}
    cards = progress.get("cards", {}).values()
    return {card["module"]: card["pid"] for card in cards if card["pid"] is not None and card["images"]}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(browser: Browser, run: Path) -> Page:
    return browser.open(run / "report.html")


def data_of(page: Page) -> dict[str, Any]:
    return dict(json.loads(page.text("#data")))


def test_its_numbers_are_those_of_the_manifests(page: Page, run: Path) -> None:
    rows = read_manifest(run)
    summary = json.loads((run / "summary.json").read_text())
    ok, failed = [[row for row in rows if row["status"] == status] for status in ("ok", "failed")]
    tiles = dict(zip(page.texts(".tile span"), page.texts(".tile b"), strict=True))
    assert tiles[f"images of {ROWS} planned"] == str(len(ok)) == str(ROWS - len(BAD))
    assert tiles[f"failed rows of {ROWS} done"] == str(len(failed)) == str(len(BAD))
    assert float(tiles["images/s of generation"]) == pytest.approx(summary["images_per_s"], abs=0.006)
    assert float(tiles["images/s of wall time"]) == pytest.approx(summary["images_per_s_wall"], abs=0.006)
    assert [value for name, value in tiles.items() if name.startswith("cards")] == [str(len(summary["cards"]))]
    cards = {cells[0]: cells for cells in page.table("#cards")}
    assert {name: int(cells[1]) for name, cells in cards.items()} == Counter(row["card"] for row in ok)
    reasons = page.table("#failures")
    assert sum(int(cells[0]) for cells in reasons) == len(failed)
    assert {(cells[0], cells[1]) for cells in page.table("#failed")} == {(str(row), f"thing-{row}") for row in BAD}
    asked = dict(zip(page.texts("#asked dt"), page.texts("#asked dd"), strict=True))
    assert (asked["prompts"], asked["batch size"]) == (str(run.parent / "prompts.parquet"), str(BATCH))
    data = data_of(page)
    bins = data["rates"]
    assert sum(bins["all"]) * bins["bin_s"] == pytest.approx(len(ok), rel=0.001)
    assert data["spent"]["generating"] + data["spent"]["warm-up"] + data["spent"]["backup"] == pytest.approx(
        summary["generate_s"], rel=0.01
    )
    held = {card["name"]: sum(card["spent"].values()) for card in data["cards"]}
    assert sum(held.values()) == pytest.approx(3600 * summary["card_hours"], rel=0.05), "all time of a card is shown"


def test_a_slow_card_a_hang_and_a_backup_are_in_the_timeline(page: Page, run: Path) -> None:
    names = {card["module"]: name for name, card in json.loads((run / "summary.json").read_text())["cards"].items()}
    slow, hung, late = names[1], names[2], names[3]
    named = [text for text in page.texts("#timeline svg text") if text.startswith(f"\u26a0 {slow} (slow)")]
    assert len(named) == 1
    (faults,) = [titles for titles in [page.titles('[aria-description="fault"]')] if titles]
    assert [title for title in faults if title.startswith(f"{hung} at") and HUNG in title]
    lost = page.titles('[aria-description="lost"]')
    assert max(seconds_of(title) for title in lost if title.startswith(f"{hung}: lost")) > 10, "the limit"
    assert [title for title in lost if title.startswith(f"{late}: lost")]
    loading = page.titles('[aria-description="loading"]')
    assert len([title for title in loading if title.startswith(f"{hung}: loading")]) == 2, "it was replaced"
    begun = page.titles('[aria-description="backup"]')
    assert [title for title in begun if "begins a backup attempt" in title]
    assert [title for title in page.titles('[aria-description="dropped"]') if title.startswith(f"{late} at")]
    made = {card["name"]: card["pace"] for card in data_of(page)["cards"]}
    assert 0.35 < made[slow] < 0.6, "1 / 2.5, and what a batch takes beside that"
    assert max(pace for name, pace in made.items() if name != slow) == pytest.approx(1, abs=0.15)


def seconds_of(title: str) -> float:
    """The length that the title of a stretch ends with, as in (4.1 s)."""
    return float(title.rpartition("(")[2].removesuffix(" s)"))


def test_text_of_others_stays_text(page: Page, run: Path) -> None:
    assert page.evaluate("window.harm") is None
    texts = page.texts(".gallery span")
    prompts = {row["prompt"] for row in read_manifest(run)}
    assert set(texts) <= prompts, "each prompt is shown as it is"
    assert page.evaluate("document.querySelectorAll('script').length") == 4
    assert page.errors == []
    assert page.requests == [], "it needs no network"


def test_each_picture_is_that_of_its_prompt(page: Page, run: Path) -> None:
    """A simulated image has the colour of its seed."""
    rows = {row["path"]: row for row in read_manifest(run)}
    for picture in data_of(page)["pictures"]:
        row = rows[picture["path"]]
        assert [picture[name] for name in ("prompt", "id", "row", "card")] == [
            row[name] for name in ("prompt", "id", "row", "card")
        ]
        assert picture["seed"] == str(row["seed"])
        small = Image.open(io.BytesIO(base64.b64decode(picture["src"].partition(",")[2]))).convert("RGB")
        whole = Image.open(run / row["path"]).convert("RGB")
        assert np.allclose(np.asarray(whole)[5, 5], np.asarray(small)[5, 5], atol=12)


def test_the_filter_leaves_what_fits(page: Page) -> None:
    pictures = data_of(page)["pictures"]
    assert page.visible(".gallery li") == len(pictures) == 500
    page.fill("input[type=search]", "THING 12")
    assert page.visible(".gallery li") == sum("thing 12" in picture["prompt"] for picture in pictures) > 0
    page.fill("input[type=search]", "row 77")
    assert (page.visible(".gallery li"), page.visible("#failed td.number")) == (0, 1)
    page.fill("input[type=search]", "")
    card = data_of(page)["cards"][0]
    page.select("select[aria-label=card]", card["name"])
    assert page.visible(".gallery li") == sum(picture["card"] == card["name"] for picture in pictures) > 0
    page.select("select[aria-label=card]", "")
    page.click(".gallery button")
    assert page.visible("dialog img") == 1
    assert page.evaluate("document.querySelector('dialog a').href").startswith("file://")
    page.click("dialog button")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800), (2560, 1440)], ids=["phone", "laptop", "wall"])
def test_it_fits_each_screen(width: int, height: int, dark: bool, browser: Browser, run: Path) -> None:
    page = browser.open(run / "report.html", width, height, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    plots = page.evaluate(
        "[...document.querySelectorAll('.plot > svg')].map((svg) => svg.getBoundingClientRect().width)"
    )
    assert len(plots) == 4
    assert all(0 < plot <= width for plot in plots)
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    lightness = [sum(map(int, color[4:-1].split(","))) for color in (ink, paper)]
    assert (lightness[0] > lightness[1]) == dark
    assert page.errors == []


@pytest.mark.usefixtures("thread_cards")
def test_its_command_makes_the_same_images(page: Page, run: Path, cluster: str) -> None:
    program, *arguments = shlex.split(page.text("#command"))
    assert program == "gaudi-batch"
    soon = ("--simulated.batch-seconds", "0", "--simulated.slow-modules", "[]")
    again = called(*arguments, *soon, "--address", cluster)
    assert again.returncode == 3, again.stderr
    sums = [{(row["row"], row["sha256"]) for row in read_manifest(Path(f"{run}{end}"))} for end in ("", "-again")]
    assert sums[0] == sums[1]


def test_it_is_made_at_any_time(run: Path, browser: Browser) -> None:
    page = browser.open(run.parent / "running.html")
    data = data_of(page)
    assert data["state"] == "running"
    assert 24 <= data["images"] == sum(card["images"] for card in data["cards"]) < ROWS
    assert page.text(".tile:first-child span") == f"images committed, of {ROWS} planned"
    assert data["spent"]["uncommitted"] > 0
    assert page.evaluate("originalOf(data.pictures[0])").startswith(f"file://{run}/images/")
    assert page.errors == []
