"""The stack: what shapes an image beside the job and its model, namely packages of a card's process, and its device.

All cards of a run must have the same, or an image would depend on which card makes it. The driver's own do not count:
it makes none, and a head may have other packages. Python and Ray are not here, since Ray lets only nodes with the same
of both join a cluster; nor is what only moves bytes, such as pyarrow and fsspec.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable

PACKAGES = ("gaudi-batch", "numpy", "pillow")
"""Packages that make an image's seed, scale its pixels and encode it, on any device."""
TORCH_PACKAGES = (*PACKAGES, "torch", "diffusers", "transformers", "tokenizers", "ftfy")
"""The same where diffusers generates. transformers has ftfy clean a prompt where it is installed, and else does it
itself, otherwise (`CLIPTokenizer` of transformers 4.55)."""
NATIVE_PACKAGES = (*TORCH_PACKAGES, "habana-torch-plugin")
"""The same on Gaudi cards. The plugin's version is that of Intel's release, graph compiler and kernels among it."""
HPU_PACKAGES = (*NATIVE_PACKAGES, "optimum-habana")
"""The same in lazy mode."""
LORA_PACKAGES = ("peft",)
"""What fuses LoRAs into a model."""
_MODULES = {"pillow": "PIL"}
"""Modules of packages whose names differ."""


def versions(packages: Iterable[str], fuses_loras: bool = False) -> dict[str, str]:
    """Versions of some packages in this process: of the imported ones, else of those installed.

    Args:
        packages: their names.
        fuses_loras: whether those that fuse LoRAs are asked for, too.
    """
    versions_here = {}
    for package in (*packages, *(LORA_PACKAGES if fuses_loras else ())):
        version = getattr(sys.modules.get(_MODULES.get(package, package)), "__version__", None)
        try:
            versions_here[package] = str(
                version or importlib.metadata.version(package)
            )  # torch has its own type for it
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions_here
