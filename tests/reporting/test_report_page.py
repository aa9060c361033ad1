"""The page of a report can be read in a real Chromium, on a phone, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import Page, opened_browser
from helpers import REPOSITORY

from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.records import read_records
from gaudi_batch.reporting.report.page import render
from gaudi_batch.reporting.report.report import describe_report
from gaudi_batch.storage.store import Storage

SICK = ["quarantined", "idle: busy for 3% of its time, others for 90%", "2 faults"]
CARDS: dict[str, list[str]] = {
    "vm-0": [],
    "vm-12": SICK,
    "place 1, never ready": SICK,
    "place 2, never ready": SICK,
    "gaudi-workers-of-the-night-0": SICK,
    "gaudi-workers-of-the-night-1": [],
}
"""Names with what is said of them."""
FULL = [
    "vm-0",
    "\u26a0 vm-12 (quarantined, idle)",
    "\u26a0 place 1, never ready (quarantined, idle)",
    "\u26a0 place 2, never ready (quarantined, idle)",
    "\u26a0 gaudi-worke\u2026-the-night-0 (quarantined, idle)",
    "gaudi-worke\u2026-the-night-1",
]
SCREENS = {"phone": (390, 844), "laptop": (1280, 800), "wall": (2560, 1440)}
PLOTS = {"timeline": "timeline of the cards", "rates": "images a second of each card"}
LABELS = '[aria-label="y-axis tick label"] text'
BOXES = "(all) => all.map((one) => { const box = one.getBoundingClientRect(); return [box.left, box.right]; })"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Page]]:
    """The page of a kept run, with other names of its cards, on each screen."""
    output = REPOSITORY / "tests/data/half_done/simulated/output"
    data = describe_report(read_records(OutputReader(Storage(str(output)))), "stopped", None)
    one = data["cards"][0]
    data["cards"] = [one | {"name": name, "label": name, "flags": flags} for name, flags in CARDS.items()]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(render(data))
    with opened_browser() as browser:
        yield {screen: browser.open(path, *size) for screen, size in SCREENS.items()}


def boxes(page: Page, selector: str) -> list[tuple[float, float]]:
    """Where elements begin and end, from the left."""
    return [(left, right) for left, right in page.page.locator(selector).evaluate_all(BOXES)]


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("screen", SCREENS)
def test_the_names_of_cards_are_whole(screen: str, plot: str, pages: dict[str, Page]) -> None:
    page, names = pages[screen], f'svg[aria-label="{PLOTS[plot]}"] {LABELS}'
    ((edge, _),) = boxes(page, f'.plot:has(> svg[aria-label="{PLOTS[plot]}"])')
    assert all(left >= edge for left, _ in boxes(page, names))
    texts = page.page.locator(names).evaluate_all("(all) => all.map((one) => one.firstChild.textContent)")
    if screen == "phone":
        assert texts[:2] == ["vm-0", "\u26a0 vm-12"], "the words are left out first"
        assert [text[:9] for text in texts[2:4]] == ["\u26a0 place 1", "\u26a0 place 2"]
        assert [(text[:5], text[-8:]) for text in texts[4:]] == [("\u26a0 gau", "-night-0"), ("gaudi", "-night-1")]
    else:
        assert texts == FULL
    assert page.titles(names) == [f"{name}: {'; '.join(flags)}" if flags else name for name, flags in CARDS.items()]


@pytest.mark.parametrize("screen", SCREENS)
def test_the_numbers_of_the_legend_are_whole(screen: str, pages: dict[str, Page]) -> None:
    page, legend = pages[screen], '.plot:has(> svg[class*="ramp"])'
    ((edge, end),) = boxes(page, legend)
    assert page.texts(f"{legend} .tick text")[0] == "0"
    assert all(edge <= left < right <= end for left, right in boxes(page, f"{legend} .tick text"))


def test_no_name_of_a_card_is_broken_in_its_table(pages: dict[str, Page]) -> None:
    page, names = pages["phone"], "#cards td:first-child"
    lines = """(all) => all.map((cell) => {
        const range = document.createRange();
        range.selectNodeContents(cell);
        return range.getClientRects().length;
    })"""
    assert page.texts(names) == list(CARDS)
    assert page.page.locator(names).evaluate_all(lines) == [1] * len(CARDS)
    assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS["phone"][0]
