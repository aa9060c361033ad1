"""Eight-bit floats, which are not emulated."""

from __future__ import annotations

from habana_frameworks._emulation.absent import absent

cast_to_fp8_v2 = absent("habana_frameworks.torch.hpex.kernels.Fp8Ops.cast_to_fp8_v2")
cast_from_fp8 = absent("habana_frameworks.torch.hpex.kernels.Fp8Ops.cast_from_fp8")
