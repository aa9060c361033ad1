"""Whether Intel's stack on a node fits together: driver, firmware, bridge, torch and optimum-habana, and the cards."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gaudi_batch.doctor import hl_smi
from gaudi_batch.doctor.line import Line, bad, note, ok
from gaudi_batch.text import one_line

COUNT_TIMEOUT_S = 180.0
"""Seconds that a process may take to import torch and to count the cards."""
_COUNT = """
import habana_frameworks.torch.core, habana_frameworks.torch.hpu as hpu, torch
print()
print({compiler!r} not in torch.compiler.list_backends(exclude_tags=()) if {compiled} else False)
print(hpu.device_count())
"""
COMPILER = "hpu_backend"
"""The name of the compiler of `gaudi.mode: compile` in torch; of pipelines/native.py."""
_VALIDATED = re.compile(r"^CURRENTLY_VALIDATED_SYNAPSE_VERSION = version\.parse\(\"(\d+\.\d+)", re.MULTILINE)
PACKAGES = ("ray", "torch", "diffusers", "transformers", "huggingface_hub", "pyarrow", "fsspec")
"""Packages that every card needs."""
RAY_WORKER = "(ray::"
"""How the name of a process of Ray begins that works for a job."""
_CONTAINER = "use Intel's container of the driver's release, or install the driver of the container's"


def python_lines(more: tuple[str, ...] = ()) -> Iterator[Line]:
    """Python, and the packages that every card needs, and some more."""
    installed = {package: _version(package) for package in (*PACKAGES, *more)}
    missing = [package for package, version in installed.items() if version is None]
    text = ", ".join(f"{package} {version}" for package, version in installed.items() if version is not None)
    text = f"Python {platform.python_version()}, {text}"
    wanted = _requirements()
    others = [f"{name}{wanted[name]}" for name, has in installed.items() if has and not _fits(has, wanted.get(name))]
    if missing:
        yield bad("packages", text, f"{', '.join(missing)} missing: pip install gaudi-batch here with the constraints")
    elif others:
        yield bad("packages", text, f"gaudi-batch needs {', '.join(others)}: install it here with the constraints")
    else:
        yield ok("packages", text)


def gaudi_lines(mode: str) -> Iterator[Line]:
    """The stack of a Gaudi node, for a mode of `gaudi.mode`."""
    bridge = _version("habana-torch-plugin")
    try:
        present = hl_smi.modules()
    except hl_smi.NoHlSmi as error:
        present = []
        yield bad("driver", str(error), "install Intel's driver; in a container, start it with --runtime=habana")
    else:
        yield from _driver_lines(present, bridge)
    if importlib.util.find_spec("habana_frameworks") is None:
        yield bad("habana_frameworks", "not installed", "it comes with Intel's container and is on no public index")
    elif bridge is None:
        yield bad("habana_frameworks", "without habana-torch-plugin", "install Intel's packages of one release")
    else:
        yield ok("habana_frameworks", bridge)
    if mode == "lazy":
        yield _optimum_line(bridge)
    yield from _card_lines(present, mode)


def _driver_lines(present: list[hl_smi.Module], bridge: str | None) -> Iterator[Line]:
    drivers = sorted({module.driver for module in present})
    text = ", ".join(drivers) or "no card"
    if len(drivers) > 1 or (drivers and bridge and _release(drivers[0]) != _release(bridge)):
        yield bad("driver", f"{text}; habana_frameworks is of {_release(bridge or '')}", _CONTAINER)
    else:
        yield (
            ok("driver", text)
            if drivers
            else bad("driver", text, "hl-smi shows no card: look at the node's PCIe, or reset it")
        )
    try:
        firmware = hl_smi.firmware()
    except hl_smi.NoHlSmi as error:
        yield note("firmware", one_line(error, 200), "look at `hl-smi --fw-versions`")
        return
    if firmware and drivers and _release(firmware) != _release(drivers[0]):
        advice = "update it with Intel's hl-fw-loader to that of the driver's release"
        yield note("firmware", f"{firmware}; the driver is {drivers[0]}", advice)
    else:
        yield ok("firmware", firmware or "hl-smi does not tell its release")


def _optimum_line(bridge: str | None) -> Line:
    version = _version("optimum-habana")
    if version is None:
        advice = "pip install 'gaudi-batch[gaudi]' -c constraints-gaudi.txt, or choose --gaudi.mode compile or eager"
        return bad("optimum-habana", "not installed", advice)
    validated = _validated_release()
    if bridge and validated and _release(bridge) != validated:
        advice = f"expect anything, or install Gaudi software {validated}"
        return note("optimum-habana", f"{version}, validated with {validated}; here is {_release(bridge)}", advice)
    return ok("optimum-habana", version)


def _card_lines(present: list[hl_smi.Module], mode: str) -> Iterator[Line]:
    counted, has_compiler, problem = _count_by_torch(mode)
    if problem:
        yield bad("cards", f"hl-smi {len(present)}, torch none: {problem}", "see the lines above; they come first")
    elif not has_compiler:
        advice = "choose --gaudi.mode lazy or eager, or a release of Intel's stack that has it"
        yield bad("cards", f"torch knows no compiler {COMPILER}, which mode compile needs", advice)
    elif counted == 0:
        yield bad(
            "cards", f"hl-smi {len(present)}, torch 0", "look at HABANA_VISIBLE_MODULES and at the container's devices"
        )
    elif counted != len(present):
        yield note(
            "cards",
            f"hl-smi {len(present)}, torch {counted}",
            "a share of a node is meant to have fewer; else look at HABANA_VISIBLE_MODULES",
        )
    else:
        yield ok("cards", f"hl-smi {len(present)}, torch {counted}")
    try:
        held = hl_smi.holders(present) if present else {}
    except hl_smi.NoHlSmi as error:
        yield note("modules held", one_line(error, 200), "look at `hl-smi`")
        return
    if not held:
        yield ok("modules held", "none")
        return
    text = "; ".join(f"{number} by {holder}" for number, holder in sorted(held.items()))
    advice = "a card that is held can't be had: end that process, or leave its module out of HABANA_VISIBLE_MODULES"
    if all(RAY_WORKER in holder for holder in held.values()):
        yield note("modules held", text, "they are at work for a job of this cluster; a run waits until they are free")
    else:
        yield (bad if len(held) == len(present) else note)("modules held", text, advice)


def _count_by_torch(mode: str) -> tuple[int, bool, str]:
    """How many cards torch counts, in a process of its own, in the mode of the job; whether it has the compiler that
    the mode needs; and why it can't say."""
    is_compiled = mode == "compile"
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _COUNT.format(compiled=is_compiled, compiler=COMPILER)],
            env=os.environ | {"PT_HPU_LAZY_MODE": "1" if mode == "lazy" else "0"},
            capture_output=True,
            text=True,
            timeout=COUNT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 0, True, f"no answer for {COUNT_TIMEOUT_S:.0f} s"
    lacks_compiler, count = ["", "", *probe.stdout.splitlines()][-2:]
    if probe.returncode != 0 or not count.isdigit():
        return 0, True, one_line((probe.stderr.strip().splitlines() or ["no answer"])[-1], 200)
    return int(count), lacks_compiler != "True", ""


def _requirements() -> dict[str, SpecifierSet]:
    """The versions that this package allows of others, also of those of its extras."""
    try:
        lines = importlib.metadata.requires("gaudi-batch") or []
    except importlib.metadata.PackageNotFoundError:  # it was shipped with a job
        return {}
    requirements = [Requirement(line) for line in lines]
    return {each.name.replace("-", "_"): each.specifier for each in requirements}


def _fits(version: str, wanted: SpecifierSet | None) -> bool:
    return wanted is None or wanted.contains(version, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    """Major and minor number of a version."""
    match = re.match(r"\d+\.\d+", version)
    return match[0] if match else version


def _validated_release() -> str:
    """The release of Intel's stack that the installed optimum-habana names; its package takes seconds to import, so its
    source is read."""
    file = importlib.metadata.distribution("optimum-habana").locate_file("optimum/habana/utils/misc.py")
    try:
        with open(str(file), encoding="utf-8") as source:  # noqa: PTH123
            match = _VALIDATED.search(source.read())
    except OSError:
        return ""
    return match[1] if match else ""
