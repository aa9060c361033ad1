"""The stretches of a card's time as they are drawn: no more of them than can be seen."""

from __future__ import annotations

from collections.abc import Sequence

from gaudi_batch.reporting.report.work import Stretch

STRETCHES_DRAWN = 1000
"""Stretches of time that are drawn of a card at most; shorter ones are merged, the longest of each moment is seen."""


def drawn(stretches: Sequence[Stretch], resolution: float) -> list[Stretch]:
    """The stretches as they are drawn: neighbours of one kind are one, and those that are shorter than can be seen are
    taken together, as what most of them are.

    Args:
        stretches: of a card, in order.
        resolution: seconds that can be told apart.
    """
    merged: list[Stretch] = []
    bin_at, spent = None, {}  # type: float | None, dict[str, float]
    bin_end = 0.0

    def add(stretch: Stretch) -> None:
        last = merged[-1] if merged else None
        if last is not None and last.kind == stretch.kind and stretch.start - last.stop < resolution / 2:
            merged[-1] = Stretch(last.kind, last.start, max(last.stop, stretch.stop))
        else:
            merged.append(stretch)

    def close() -> None:
        nonlocal bin_at
        if bin_at is not None:
            add(Stretch(max(spent, key=lambda kind: spent[kind]), bin_at, bin_end))
            bin_at = None
            spent.clear()

    for stretch in stretches:
        length = stretch.stop - stretch.start
        if length >= resolution:
            close()
            add(stretch)
            continue
        if bin_at is not None and stretch.stop - bin_at > resolution:
            close()
        if bin_at is None:
            bin_at = stretch.start
        spent[stretch.kind] = spent.get(stretch.kind, 0.0) + length
        bin_end = stretch.stop
    close()
    return merged
