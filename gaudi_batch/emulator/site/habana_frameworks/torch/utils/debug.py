"""Debugging of the bridge, which is not emulated."""

from __future__ import annotations

from habana_frameworks._emulation.absent import absent

dump_refinement_recipe = absent("habana_frameworks.torch.utils.debug.dump_refinement_recipe")
dump_state_and_terminate = absent("habana_frameworks.torch.utils.debug.dump_state_and_terminate")
