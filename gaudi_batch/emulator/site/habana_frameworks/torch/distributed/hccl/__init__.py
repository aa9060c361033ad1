"""Collective communication: can be imported, and says of each function that it is not emulated."""

from __future__ import annotations

from habana_frameworks._emulation.absent import absent

initialize_distributed_hpu = absent("habana_frameworks.torch.distributed.hccl.initialize_distributed_hpu")
