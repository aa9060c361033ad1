"""What hl-smi tells of a node: the driver, the firmware, the modules and who holds them.

The options and the table are those of Intel's documentation, "System Management Interface Tool".
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 30.0
"""Seconds that hl-smi may take; it takes one or two."""
_PROCESS = re.compile(r"\|\s+(?P<index>\d+)\s+(?P<pid>\d+)\s")
_RELEASE = re.compile(r"hl-\w+-(\d+\.\d+\.\d+)-fw")
"""The release in the version of a component of the firmware, as in hl-gaudi2-1.24.0-fw-62.0.1-sec-9."""


class NoHlSmi(Exception):
    """hl-smi is not there, or fails; the message says which."""


@dataclass(frozen=True)
class Module:
    """A card as hl-smi has it."""

    number: int
    """The number of the module, as in HABANA_VISIBLE_MODULES."""
    index: int
    """Its place in hl-smi's table."""
    driver: str
    """The version of the driver."""


def modules() -> list[Module]:
    """The cards of this node. Raises NoHlSmi."""
    answer = _ask("-Q", "index,module_id,driver_version", "-f", "csv,noheader,nounits")
    cells = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    try:
        return [Module(int(number), int(index), driver) for index, number, driver in cells]
    except ValueError:
        raise NoHlSmi(f"hl-smi says something else than numbers of modules: {answer.splitlines()[0][:100]!r}") from None


def firmware() -> str:
    """The release of the firmware; empty if hl-smi does not tell. Raises NoHlSmi."""
    releases = _RELEASE.findall(_ask("--fw-versions"))
    return max(set(releases), key=releases.count) if releases else ""


def holders(present: list[Module]) -> dict[int, str]:
    """The process that holds each module that is held, in words, by the module's number. Raises NoHlSmi."""
    _, _, table = _ask().partition("Compute Processes")
    numbers = {module.index: module.number for module in present}
    held = {}
    for match in map(_PROCESS.match, table.splitlines()):
        if match is not None and int(match["index"]) in numbers:
            held[numbers[int(match["index"])]] = f"process {match['pid']} ({_command(match['pid'])})"
    return held


def _command(pid: str) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "of another user or container"
    return words[:60] or "without a name"


def _ask(*options: str) -> str:
    try:
        answer = subprocess.run(["hl-smi", *options], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise NoHlSmi("hl-smi is not on the PATH") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoHlSmi(f"hl-smi does not answer: {error}") from None
    if answer.returncode != 0:
        raise NoHlSmi(f"hl-smi {' '.join(options)} fails: {(answer.stderr or answer.stdout).strip()[:200]}")
    return answer.stdout
