"""Tests that run inside `gaudi-batch emulate`, all in one process; see test_emulator.py, which starts it."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("habana_frameworks") is None:
    collect_ignore_glob = ["*"]
else:
    # As for upstream's own tests: optimum-habana's graphs need lazy mode, which is no longer the default.
    os.environ.setdefault("PT_HPU_LAZY_MODE", "1")


@pytest.fixture(autouse=True)
def diffusers_own_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what optimum-habana does to diffusers for a reduced precision, in a whole process and for ever."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "forward", UNet2DConditionModel.forward)
