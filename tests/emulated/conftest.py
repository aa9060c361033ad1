"""Tests that run inside `gaudi-batch emulate`, all in one process; see test_emulator.py, which starts it."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("habana_frameworks") is None:
    collect_ignore_glob = ["*"]
