"""A stand-in for Intel's habana_frameworks on the CPU, put on the path only by `gaudi-batch emulate`."""

from __future__ import annotations

import functools
import os
import subprocess
from typing import Any

EMULATED = True
"""The real one has no such name: records and measurements can tell."""


def __autoload() -> None:
    """What `import torch` calls, by the entry point of the plugin: in eager mode it makes device hpu known.

    In lazy mode a program imports `habana_frameworks.torch` itself: what must be set before that, such as the lists of
    autocast, can then still be set.
    """
    from habana_frameworks._emulation.settings import is_lazy

    if not is_lazy():
        import habana_frameworks.torch  # noqa: F401


def _find_hl_smi() -> None:
    """The folder of hl-smi counts as one of the system's, as /usr/bin does where the real one is.

    optimum-habana runs hl-smi with an environment that has no PATH, so the shell looks in its default folders.
    """
    folder = os.environ.get("GAUDI_EMULATOR_BIN")
    if folder is None:
        return
    plain_init = subprocess.Popen.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("env") is not None and "PATH" not in kwargs["env"]:
            kwargs["env"] = {**kwargs["env"], "PATH": f"{folder}{os.pathsep}{os.defpath}"}
        plain_init(self, *args, **kwargs)

    subprocess.Popen.__init__ = init  # type: ignore[method-assign]


_find_hl_smi()
