"""Libraries that people open images with, in the environment of `make loaders`: another than that of gaudi-batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import TESTS

LOADERS = Path(sys.prefix) / "loaders"
OPEN_SET = TESTS / "loaders/open_set.py"
Images = list[tuple[int, str, str]]
"""Row, prompt and digest of each image."""


def run_outside(*arguments: str, home: Path, cwd: Path | None = None, **environment: str) -> str:
    """Runs Python in that environment; returns what it prints.

    Args:
        arguments: of Python.
        home: for what the libraries keep.
        cwd: where it runs.
        environment: variables.
    """
    if not (LOADERS / "datasets").is_dir():
        pytest.fail("the libraries are not installed; `make loaders`, or `make setup`, does that")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    variables |= {"PYTHONPATH": str(LOADERS), "HF_HOME": str(home), "HOME": str(home), **environment}
    python = getattr(sys, "_base_executable", sys.executable)
    result = subprocess.run(
        [python, *arguments], env=variables, cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def opened(ways: str, place: str, home: Path, options: Mapping[str, Any] | None = None) -> dict[str, Images]:
    """What each way of open_set.py finds in a place."""
    printed = run_outside(str(OPEN_SET), ways, place, json.dumps(options or {}), home=home)
    answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return {answer["way"]: sorted(map(tuple, answer["images"])) for answer in answers}
