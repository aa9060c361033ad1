"""Which cards may make images of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gaudi_batch.pipelines.stack import differences

if TYPE_CHECKING:
    from gaudi_batch.card.messages import CardSetup, Ready

DIGITS = 12
"""Of a model's SHA-256 or commit that a message shows."""


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
