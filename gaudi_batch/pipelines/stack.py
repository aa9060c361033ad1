"""What shapes an image beside the job and its model: the packages of a card's process, and its device.

All cards of a run must have the same, or an image would depend on which card makes it. The driver's own do not count:
it makes none, and a head may have other packages. Python and Ray are not here, since Ray lets only nodes with the same
of both join a cluster; nor is what only moves bytes, such as pyarrow and fsspec.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gaudi_batch.card.messages import CardSetup, Ready

PACKAGES = ("gaudi-batch", "numpy", "pillow")
"""What makes an image's seed, scales its pixels and encodes it, on any device."""
TORCH_PACKAGES = (*PACKAGES, "torch", "diffusers", "transformers", "tokenizers", "ftfy")
"""The same where diffusers generates. transformers has ftfy clean a prompt where it is installed, and else does it
itself, otherwise (`CLIPTokenizer` of transformers 4.55)."""
HPU_PACKAGES = (*TORCH_PACKAGES, "optimum-habana", "habana-torch-plugin")
"""The same on Gaudi cards. The plugin's version is that of Intel's release, graph compiler and kernels among it."""

_MODULES = {"pillow": "PIL"}
"""Packages whose module has another name."""
DIGITS = 12
"""Of a model's SHA-256 or commit that a message shows."""
STACK_VOTE_TIMEOUT_S = 60.0
"""How long the cards that differ may wait for the first record of one that works; a shard may take hours."""


class StackVote:
    """Which stack the cards of a driver are to have, so that one odd node costs that node alone.

    A card that has another waits. If any card has the stack that made the run's last images, that is it, for good. Else
    none works before all cards that the cluster has given have loaded or failed, and it is the one that most have. In a
    new run the first card works at once, and the others' word counts until the first record of one is there, or
    STACK_VOTE_TIMEOUT_S are over: as long as nothing is committed, a stack that more cards have takes its place.

    Args:
        before: what made the run's last images; None where that is not known.
    """

    def __init__(self, before: Mapping[str, str] | None) -> None:
        self.stack: Mapping[str, str] | None = None
        """That of the cards that work; None as long as none does."""
        self.settled = False
        """Whether it stays that, so that who differs has nothing to wait for."""
        self._before = before
        self._since = 0.0

    @property
    def expected(self) -> Mapping[str, str] | None:
        """What a card is compared with now."""
        return self._before if self.stack is None else self.stack

    def count(self, up: Sequence[Mapping[str, str]], coming: bool, now: float) -> None:
        """Decides anew.

        Args:
            up: the stack of each card that has loaded, of those that wait, too.
            coming: whether other cards are loading.
            now: seconds, monotonic.
        """
        if self.settled:
            return
        if self._before is not None and self._before in up:
            self.stack, self.settled = self._before, True
            return
        if self.stack is None:
            if not up or (self._before is not None and coming):
                return
            self.stack, self._since = up[0], now
        most = max(up, key=up.count, default=self.stack)
        if up.count(most) > up.count(self.stack):
            self.stack = most
        self.settled = now - self._since >= STACK_VOTE_TIMEOUT_S


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of some packages that this process has: of what it has imported, else of what is installed."""
    found = {}
    for package in packages:
        version = getattr(sys.modules.get(_MODULES.get(package, package)), "__version__", None)
        try:
            found[package] = str(version or importlib.metadata.version(package))  # torch has a type of its own for it
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What two stacks do not have in common: its name, what it is in ours, and in theirs."""
    names = sorted(ours.keys() | theirs.keys())
    pairs = [(name, ours.get(name, "missing"), theirs.get(name, "missing")) for name in names]
    return [(name, here, there) for name, here, there in pairs if here != there]


def why_unfit(ready: Ready, setup: CardSetup, stack: Mapping[str, str]) -> str:
    """Why a card is no card for this run, whose images are to be the same whoever makes them; empty if it is one.

    Args:
        ready: what the card says of itself.
        setup: the job, whose model it must have, and CPUs for whose threads.
        stack: what the cards of the run have.
    """
    found = differences(ready.stack, stack)
    if ready.model != setup.model.revision:
        found.append((f"model {setup.model.name}", ready.model[:DIGITS], setup.model.revision[:DIGITS]))
    if found:
        said = "; ".join(f"{name} is {here}, and {there} in this run" for name, here, there in found)
        return f"node {ready.node} would make other images: {said}; every node needs the same"
    if ready.cpus < setup.min_cpus:
        return (
            f"node {ready.node} may use {ready.cpus} CPUs (affinity, cgroup), and a card of this run has"
            f" {setup.threads} threads, on which images depend; give the node as many, or take it out of the cluster"
        )
    return ""
