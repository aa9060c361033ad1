"""The rows of a shard, batch by batch, through a pipeline; and which row is at fault when a call raises.

Every call has the same number of images: a short batch is filled by repeating its last item. A batch that raises is
run again row by row. A row that raises alone, or whose image can't be right, is at fault only if the card makes
another row of the same bucket afterwards; where none is left to make, one that worked before is made once more as a
control.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gaudi_batch.outputs.encoding import to_pixels
from gaudi_batch.pipelines.base import DeviceError, Generated, Item
from gaudi_batch.redaction import redact
from gaudi_batch.rows import PromptRow, image_seed
from gaudi_batch.text import one_line

NEUTRAL = Item(-1, 0, "", "", 0)
"""The control of a card that has made nothing yet: an empty prompt, of no row."""


class CardFault(Exception):
    """The card, or all that is left of the shard, fails; `accused` are the rows that may be to blame."""

    def __init__(self, error: str, accused: Mapping[int, str]) -> None:
        super().__init__(error)
        self.accused = dict(accused)


@dataclass(frozen=True)
class MadeImage:
    """One image that was generated and looks right."""

    item: Item
    pixels: npt.NDArray[np.uint8]
    """Shape (height, width, 3)."""
    nsfw: bool | None
    truncated: bool


@dataclass
class ShardMaker:
    """Makes the images of one shard.

    Args:
        rows: the shard's rows.
        batch_size: images of each call.
        run_seed: seed of the run.
        call: generates a whole batch.
        announce: called with the rows of a batch before its call; may wait.
        alone: rows to run one at a time from the start.
        accused: rows that raised alone elsewhere; raising alone here makes them failed.
        condemned: rows to record as failed without a try.
        control: an item of the bucket that this card has made before, if there is one.
        suspect: whether a process died of this shard. Then a control comes first, announced as no row at all: what
            the card does to that is no row's fault.
    """

    rows: Sequence[PromptRow]
    batch_size: int
    run_seed: int
    call: Callable[[list[Item]], Generated]
    announce: Callable[[tuple[int, ...]], None] = lambda rows: None
    alone: frozenset[int] = frozenset()
    accused: Mapping[int, str] = field(default_factory=dict)
    condemned: Mapping[int, str] = field(default_factory=dict)
    control: Item | None = None
    suspect: bool = False
    failures: dict[int, str] = field(default_factory=dict)
    """Rows that failed, with their errors; complete when `batches` has ended."""
    raised: set[int] = field(default_factory=set)
    """Those among them that were tried."""
    _unproven: dict[int, str] = field(default_factory=dict)

    def batches(self) -> Iterator[list[MadeImage]]:
        """Generates the shard; each list holds what one pipeline call made.

        Raises:
            CardFault: rows failed and nothing shows that it was not the card.
        """
        runnable = []
        for row in self.rows:
            if row.error is not None:
                self.failures[row.row] = row.error
            elif row.row in self.condemned:
                self.failures[row.row] = self.condemned[row.row]
                self.raised.add(row.row)
            else:
                runnable.append(row)
        if self.suspect and runnable:
            self.announce(())
            self.control = self.control or NEUTRAL
            self._make_control()
        apart = self.alone | self.accused.keys()
        together = (item for row in runnable if row.row not in apart for item in self._items(row))
        for group in _chunks(together, self.batch_size):
            yield from self._make(group)
        for row in runnable:
            if row.row in apart:
                for group in _chunks(self._items(row), self.batch_size):
                    yield from self._make(group)
        if self._unproven:
            self._prove_by_control()

    def _items(self, row: PromptRow) -> Iterator[Item]:
        for image in range(row.num_images):
            yield Item(row.row, image, row.prompt, row.negative_prompt, image_seed(self.run_seed, row, image))

    def _make(self, group: list[Item]) -> Iterator[list[MadeImage]]:
        group = [item for item in group if item.row not in self.failures and item.row not in self._unproven]
        if not group:
            return
        rows = tuple(dict.fromkeys(item.row for item in group))
        self.announce(rows)
        try:
            made, wrong = self._generate(group)
        except DeviceError:
            raise
        except Exception as error:
            said = describe_error(error)
            if len(rows) == 1:
                self._blame(rows[0], said)
                return
            for row in rows:
                yield from self._make([item for item in group if item.row == row])
            if len(self._unproven) >= self.batch_size and self.control is not None:
                self._prove_by_control()
            return
        for row, said in wrong.items():
            self._blame(row, said)
        if made:
            self._prove()
            self.control = made[0].item
            yield made

    def _generate(self, group: list[Item]) -> tuple[list[MadeImage], dict[int, str]]:
        filled = group + [group[-1]] * (self.batch_size - len(group))
        generated = self.call(filled)
        made, wrong = [], {}
        for place, item in enumerate(group):
            try:
                pixels = to_pixels(generated.images[place])
                if not pixels.any() and not generated.nsfw[place]:
                    raise ValueError("the image is black, and not by the safety checker")
            except ValueError as error:
                wrong[item.row] = f"image {item.image}: {error}"
            else:
                made.append(MadeImage(item, pixels, generated.nsfw[place], generated.truncated[place]))
        return made, wrong

    def _blame(self, row: int, error: str) -> None:
        if row in self.accused:
            self.failures[row] = error
            self.raised.add(row)
        else:
            self._unproven.setdefault(row, error)

    def _prove(self) -> None:
        self.failures.update(self._unproven)
        self.raised.update(self._unproven)
        self._unproven.clear()

    def _prove_by_control(self) -> None:
        if self.control is None:
            raise CardFault(next(iter(self._unproven.values())), self._unproven)
        self._make_control()
        self._prove()

    def _make_control(self) -> None:
        assert self.control is not None
        try:
            made, wrong = self._generate([self.control])
        except DeviceError:
            raise
        except Exception as error:
            raise CardFault(f"the card can't make its control: {describe_error(error)}", {}) from None
        if not made:
            raise CardFault(f"the card can't make its control: {next(iter(wrong.values()))}", {})


def describe_error(error: BaseException) -> str:
    """An exception in one printable line of at most 500 characters."""
    return one_line(redact(f"{type(error).__name__}: {error}"))


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk
