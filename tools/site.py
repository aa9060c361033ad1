"""Builds the site of the documentation from README.md and docs/, and refuses what is broken in it.

    python tools/site.py

The pages are written as GitHub shows them. For the site, links to files outside of docs/ become links to copies of
these. Every link and anchor must lead somewhere, and no page may fetch anything from elsewhere.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES, SITE = "build/pages", "build/site"
OUTSIDE_DOCS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "tests/README.md": "tests.md",
    "gaudi_batch/models/shapes/README.md": "shapes.md",
}
"""Pages of the site that do not lie in docs/."""
MERMAID = ".venv/mermaid/node_modules/@mermaid-js/tiny/dist/mermaid.tiny.js"
"""Draws diagrams in the browser. The theme fetches it from unpkg.com where a page does not bring it along."""
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FETCHES = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


def page_names(repository: Path) -> dict[str, str]:
    """The pages of the site: {path in the repository: name in the site}."""
    outside = {path: name for path, name in OUTSIDE_DOCS.items() if (repository / path).exists()}
    return outside | {f"docs/{path.name}": path.name for path in sorted((repository / "docs").glob("*.md"))}


def write_pages(repository: Path) -> list[str]:
    """Writes the pages as the site has them, with copies of what they link to; returns what is wrong with links."""
    pages = repository / PAGES
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    names, wrong = page_names(repository), list[str]()

    def relinked(page: str, match: re.Match[str]) -> str:
        image, text, link = match.groups()
        path, _, anchor = link.partition("#")
        if "://" in link or not path:
            return match[0]
        target = (repository / page).parent / path
        if not target.exists():
            wrong.append(f"{page}: {link} leads nowhere")
            return match[0]
        if target.is_dir():
            return text
        inside = target.resolve().relative_to(repository).as_posix()
        if inside in names:
            return f"[{text}]({names[inside]}{'#' if anchor else ''}{anchor})"
        # Browsers show a text, and save a file of another type.
        copy = f"files/{inside}" if image else f"files/{inside}.txt"
        (pages / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, pages / copy)
        return f"{image}[{text}]({copy})"

    for page, name in names.items():
        text = (repository / page).read_text(encoding="utf-8")
        # Every other part is a block of code, whose brackets are no links.
        parts = _FENCED.split(text)
        parts[::2] = [_LINK.sub(functools.partial(relinked, page), part) for part in parts[::2]]
        if "```mermaid" in text:
            shutil.copy(repository / MERMAID, pages)
            parts.append(f'\n<script src="{Path(MERMAID).name}"></script>\n')
        (pages / name).write_text("".join(parts), encoding="utf-8")
    return wrong


class _Fetches(HTMLParser):
    """What a page fetches from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See HTMLParser."""
        attributes = dict(attrs)
        address = attributes.get(_FETCHES.get(tag, "")) or ""
        if address.startswith(("http:", "https:", "//")) and attributes.get("rel") not in ("canonical", "prev", "next"):
            self.addresses.append(address)


def foreign_fetches(pages: Path) -> Iterator[str]:
    """What pages would fetch from elsewhere when they are opened."""
    for page in sorted(pages.rglob("*.html")):
        parser = _Fetches()
        parser.feed(page.read_text(encoding="utf-8"))
        yield from (f"{page.relative_to(pages)}: fetches {address}" for address in parser.addresses)


def main(repository: Path = REPOSITORY) -> int:
    """Builds the site; returns 1 if something is wrong with it."""
    if sys.version_info < (3, 11):
        print("the site is not built: zensical needs Python 3.11")
        return 0
    wrong = write_pages(repository)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", "mkdocs.yml"]
    built = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if built.returncode:
        # After its warnings is the trace of the error that ended it, which says no more.
        wrong.append(built.stdout + built.stderr.partition("Traceback")[0])
    else:
        wrong += foreign_fetches(repository / SITE)
    print("\n".join(wrong) or f"the site is in {SITE}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
