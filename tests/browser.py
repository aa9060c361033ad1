"""A real Chromium, by Playwright, that opens pages from this disk."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import playwright.sync_api as playwright
import pytest

TIMEOUT_MS = 120_000.0
PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")


@dataclass
class Page:
    """A page that is open.

    Args:
        page: as Playwright has it.
    """

    page: playwright.Page
    errors: list[str] = field(default_factory=list)
    """What its console has said that was no mere note."""
    requests: list[str] = field(default_factory=list)
    """What it has asked for beside its own file."""

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.page.evaluate(expression)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.page.locator(selector).first.text_content() or ""

    def texts(self, selector: str) -> list[str]:
        """The texts of elements."""
        return list(self.page.locator(selector).all_text_contents())

    def table(self, section: str) -> list[list[str]]:
        """The cells of a section's table, row by row, without its head."""
        script = "(rows) => rows.map((row) => [...row.querySelectorAll('td')].map((cell) => cell.textContent))"
        return [row for row in self.page.locator(f"{section} tr").evaluate_all(script) if row]

    def titles(self, selector: str) -> list[str]:
        """The titles inside of elements."""
        return self.texts(f"{selector} title")

    def visible(self, selector: str) -> int:
        """How many of these elements take up space."""
        script = "(all) => all.filter((one) => one.getClientRects().length > 0).length"
        return int(self.page.locator(selector).evaluate_all(script))

    def fill(self, selector: str, text: str) -> None:
        """Types into a field."""
        self.page.fill(selector, text)

    def select(self, selector: str, value: str) -> None:
        """Chooses from a list."""
        self.page.select_option(selector, value)

    def click(self, selector: str) -> None:
        """Clicks on the first such element."""
        self.page.locator(selector).first.click()


@dataclass
class Browser:
    """The program.

    Args:
        browser: as Playwright has it.
    """

    browser: playwright.Browser

    def open(self, file: Path, width: int = 1280, height: int = 800, *, dark: bool = False) -> Page:
        """Opens a page of this disk in a window of this size, and waits until it has drawn itself."""
        raw = self.browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        raw.set_default_timeout(TIMEOUT_MS)
        page = Page(raw)
        url = file.resolve().as_uri()
        raw.on("console", lambda message: page.errors.append(message.text) if message.type != "log" else None)
        raw.on("pageerror", lambda error: page.errors.append(str(error)))
        raw.on(
            "request",
            lambda request: None if request.url.startswith(("data:", url)) else page.requests.append(request.url),
        )
        raw.goto(url)
        raw.wait_for_function("document.documentElement.dataset.drawn === 'true'")
        return page


@contextlib.contextmanager
def opened_browser() -> Iterator[Browser]:
    """Starts the browser; skips the test where there is none, but not in CI."""
    if PROGRAM is None:
        if os.environ.get("CI"):
            pytest.fail("there is no Chromium; .ci/run installs it")
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        try:
            yield Browser(browser)
        finally:
            browser.close()
