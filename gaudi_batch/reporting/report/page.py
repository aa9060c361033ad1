"""The report as one file: HTML with its style, its script, the plotting library and the data."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.metadata
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

ASSETS = "gaudi_batch.reporting.report.assets"
SCRIPTS = ("d3.min.js", "plot.umd.min.js", "report.js")
"""In the order in which they run."""


def render(report: Mapping[str, Any]) -> bytes:
    """The page.

    Prompts and errors are the users' text, and no part of them becomes markup: the data lies in a script element of
    JSON without a `<`, and the script makes text nodes of it. The page's policy lets no other script run, and nothing
    be loaded.

    Args:
        report: what it shows, see `report.py`.
    """
    # A U+2028 ends a line in old JavaScript; escaped, JSON is ASCII.
    data = json.dumps(report, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    scripts = [_asset(name) for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'"
    parts = {
        "policy": policy,
        "title": html.escape(f"gaudi-batch: {report['output']}"),
        "style": _asset("report.css"),
        "data": data,
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    page = _asset("report.html")
    before, *rest = page.split("{{")
    pieces = [before]
    for piece in rest:
        name, _, text = piece.partition("}}")
        pieces += [parts[name], text]
    return "".join(pieces).encode()


def version() -> str:
    """Of this program."""
    try:
        return importlib.metadata.version("gaudi-batch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _asset(name: str) -> str:
    return (importlib.resources.files(ASSETS) / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
