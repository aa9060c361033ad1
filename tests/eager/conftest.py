"""Tests that run inside `gaudi-batch emulate` in eager mode, all in one process; test_emulator.py starts it."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("habana_frameworks") is None:
    collect_ignore_glob = ["*"]
