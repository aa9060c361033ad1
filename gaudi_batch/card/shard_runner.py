"""The rows of a shard, batch by batch, through a pipeline; and which row is at fault when a call raises.

Every call has the same number of images: a short batch is filled by repeating its last item. A batch that raises is
run again row by row. A row that raises alone is at fault only if the card makes another row of the same bucket
afterwards; where none is left to make, one that worked before is made once more as a probe. An image that can't be
right is made once more alone. If it is right then, that counts against the card; if not, its row is doubted, and
another card makes it again, and decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.dataset.rows import PromptRow, image_seed
from gaudi_batch.output.formats.encoding import to_pixels
from gaudi_batch.pipelines.base import DeviceError, Generated, Item
from gaudi_batch.scheduling.decisions import ShardTask
from gaudi_batch.text import describe_error

PROBE = Item(-1, 0, "", "", 0)
"""The probe of a card that has made nothing yet: an empty prompt of no row."""


class CardFault(Exception):
    """The card fails, or all that is left of the shard does; `failed_alone_once` are the rows that may be at fault."""

    def __init__(self, error: str, failed_alone_once: Mapping[int, str]) -> None:
        super().__init__(error)
        self.failed_alone_once = dict(failed_alone_once)


@dataclass(frozen=True)
class MadeImage:
    """One image that was generated and looks right."""

    item: Item
    pixels: npt.NDArray[np.uint8]
    """Shape (height, width, 3)."""
    nsfw: bool | None
    truncated: bool


@dataclass(frozen=True)
class ShardRows:
    """A shard, and its rows as read from the prompts."""

    task: ShardTask
    rows: list[PromptRow]
    carried: pa.Table
    """The carried columns of the same rows."""


class ShardMaker:
    """Makes the images of one shard.

    Args:
        work: the shard, what is known of its rows, and the rows.
        config: of the job, whose `batch_size` is that of each call.
        call: generates a whole batch.
        announce: called with the rows of a batch before its call; may wait.
        probe: an item of the bucket that this card has made before, if there is one. A suspect shard begins with it,
            announced as no row at all: what the card does to that is no row's fault.
        graph_key: what the items of one call must have in common beside the bucket, see `Pipeline`.
    """

    def __init__(
        self,
        work: ShardRows,
        config: JobConfig,
        call: Callable[[list[Item]], Generated],
        announce: Callable[[tuple[int, ...]], None] = lambda rows: None,
        probe: Item | None = None,
        graph_key: Callable[[Item], Hashable] = lambda item: None,
    ) -> None:
        self.probe = probe
        self.failures: dict[int, str] = {}
        """Rows that failed, with their errors; complete when `batches` has ended."""
        self.raised: set[int] = set()
        """Those of them that the pipeline was called for."""
        self.doubted: dict[int, str] = {}
        """Those of them that another card has to make again; its result decides."""
        self.transient_failures = 0
        """Calls that raised and images that were wrong, and that worked when repeated."""
        self._task, self._rows, self._call, self._announce = work.task, work.rows, call, announce
        self._graph_key = graph_key
        self._batch_size, self._run_seed = config.batch_size, config.seed
        self._unconfirmed: dict[int, str] = {}

    def batches(self) -> Iterator[list[MadeImage]]:
        """Generates the shard; each list holds what one pipeline call made.

        Raises:
            CardFault: rows failed and nothing shows that it was not the card.
        """
        runnable = []
        for row in self._rows:
            if self._task.confirm and row.row not in self._task.confirm:
                continue
            if row.error is not None:
                self.failures[row.row] = row.error
            elif row.row in self._task.fail_without_running:
                self.failures[row.row] = self._task.fail_without_running[row.row]
                self.raised.add(row.row)
            else:
                runnable.append(row)
        if self._task.announce and runnable:
            self._announce(())
            self._make_probe()
        apart = self._task.alone | self._task.failed_alone_once.keys() | self._task.confirm
        for group_rows in self._of_one_graph([row for row in runnable if row.row not in apart]):
            for group in _chunks((item for row in group_rows for item in self._items(row)), self._batch_size):
                yield from self._make(group)
        for row in runnable:
            if row.row in apart:
                for group in _chunks(self._items(row), self._batch_size):
                    yield from self._make(group)
        if self._unconfirmed:
            self._confirm_by_probe()
        if self.doubted and self.probe is None:
            raise CardFault(next(iter(self.doubted.values())), self.doubted)
        if self._task.confirm and self.raised:
            self._make_probe()  # else a faulty card would confirm failures
        self.failures.update(self.doubted)
        self.raised.update(self.doubted)

    def _items(self, row: PromptRow) -> Iterator[Item]:
        for image in range(row.num_images):
            yield Item(row.row, image, row.prompt, row.negative_prompt, image_seed(self._run_seed, row, image))

    def _of_one_graph(self, rows: list[PromptRow]) -> Iterable[list[PromptRow]]:
        groups: dict[Hashable, list[PromptRow]] = {}
        for row in rows:
            try:
                key = self._graph_key(next(self._items(row)))
            except Exception:
                key = row.row  # its text can't be read, as its own call then says
            groups.setdefault(key, []).append(row)
        return groups.values()

    def _is_lost(self, row: int) -> bool:
        return row in self.failures or row in self._unconfirmed or row in self.doubted

    def _make(self, group: list[Item]) -> Iterator[list[MadeImage]]:
        group = [item for item in group if not self._is_lost(item.row)]
        if not group:
            return
        rows = tuple(dict.fromkeys(item.row for item in group))
        self._announce(rows)
        try:
            made, wrong = self._generate(group)
        except DeviceError:
            raise
        except Exception as error:
            if len(rows) == 1:
                self._suspect(rows[0], describe_error(error))
                return
            for row in rows:
                yield from self._make([item for item in group if item.row == row])
            self.transient_failures += not any(map(self._is_lost, rows))
            if len(self._unconfirmed) >= self._batch_size and self.probe is not None:
                self._confirm_by_probe()
            return
        if made:
            self._has_made(made[0].item)
            yield made
        for item in wrong:
            if not self._is_lost(item.row):
                yield from self._make_again(item)
        if not made and self.probe is not None and all(map(self._is_lost, rows)):
            self._make_probe()

    def _make_again(self, item: Item) -> Iterator[list[MadeImage]]:
        """Makes an image again, alone, that was wrong in its batch."""
        self._announce((item.row,))
        try:
            made, wrong = self._generate([item])
        except DeviceError:
            raise
        except Exception as error:
            self._suspect(item.row, describe_error(error))
            return
        if made:
            self.transient_failures += 1
            self._has_made(item)
            yield made
        elif self._confirms_failure(item.row):
            self._fail(item.row, wrong[item])
        else:
            self.doubted[item.row] = wrong[item]

    def _generate(self, group: list[Item]) -> tuple[list[MadeImage], dict[Item, str]]:
        """One call of the pipeline; returns the right images, and what is wrong with the others."""
        filled = group + [group[-1]] * (self._batch_size - len(group))
        generated = self._call(filled)
        made, wrong = [], {}
        for place, item in enumerate(group):
            try:
                pixels = to_pixels(generated.images[place])
                if not pixels.any() and not generated.nsfw[place]:
                    raise ValueError("the image is black, and not by the safety checker")
            except ValueError as error:
                wrong[item] = f"image {item.image}: {error}"
            else:
                made.append(MadeImage(item, pixels, generated.nsfw[place], generated.truncated[place]))
        return made, wrong

    def _confirms_failure(self, row: int) -> bool:
        return row in self._task.failed_alone_once or row in self._task.confirm

    def _suspect(self, row: int, error: str) -> None:
        if self._confirms_failure(row):
            self._fail(row, error)
        else:
            self._unconfirmed.setdefault(row, error)

    def _fail(self, row: int, error: str) -> None:
        self.failures[row] = error
        self.raised.add(row)

    def _has_made(self, item: Item) -> None:
        self._confirm_failures()
        self.probe = item

    def _confirm_failures(self) -> None:
        for row, error in self._unconfirmed.items():
            self._fail(row, error)
        self._unconfirmed.clear()

    def _confirm_by_probe(self) -> None:
        if self.probe is None:
            raise CardFault(next(iter(self._unconfirmed.values())), self._unconfirmed | self.doubted)
        self._make_probe()
        self._confirm_failures()

    def _make_probe(self) -> None:
        self.probe = self.probe or PROBE
        try:
            made, wrong = self._generate([self.probe])
        except DeviceError:
            raise
        except Exception as error:
            raise CardFault(f"the card can't make its probe: {describe_error(error)}", {}) from None
        if not made:
            raise CardFault(f"the card can't make its probe: {next(iter(wrong.values()))}", {})


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk
