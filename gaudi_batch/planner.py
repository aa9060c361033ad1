"""From a dataset's row counts and shapes to shards. Pure: no Ray, no torch, no clock, no I/O.

A dataset reaches the planner as spans: rows of one file that ask for the same thing, consecutive at least among those
of their bucket. Without per-row shape columns a row group is one span, so that planning costs nothing per row. The
planner keeps one open shard
for each bucket and closes it when it is full or its file ends; at the end of a row group, too, where that costs little
padding, since a card decodes whole row groups. A shard is therefore named by a row range and a bucket alone; the ranges
of two buckets may overlap, and no row list is stored.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gaudi_batch.plan import Bucket, GroupRows, RowSpan, Shard

PARTS_OF_SHARE = 16
"""Parts of a card's share of what is left, of which a shard is one."""
MAX_IMAGES = 1024
"""Images of a shard at most, where its rows ask for one each."""
MAX_WORK = 5e9
"""Pixels times steps of a shard at most, counted twice with guidance: 119 images of 1024 x 1024 in 20 steps with
guidance, which take a Gaudi 2 two and a half minutes at the 0.782 images/s of MLPerf Inference 4.0 (SDXL), and one that
runs a larger model up to some ten."""
MAX_SHARDS = 900_000
"""Shards of a plan that chooses its sizes, at most, but for those that files and buckets cut."""
BATCHES_BEFORE_CUT = 50
"""Batches of a bucket after which a shard of it ends with its row group: so a batch that is cut short, half full on
average, is padding of a hundredth at most."""
RECUT_FACTOR = 2
"""A resumed run is cut anew where a shard is so many times larger than it would be planned now."""
IDLE_SHARE = 0.25
"""The part of a shard for which a card idles at the end: of 0.25, 0.5 and 1 this one ended simulated runs of rows of
several images soonest."""
MAX_SHARE = 0.25
"""The part of a card's share of what is left that a shard is at most, if its rows ask for different numbers."""
MIXED_SHARE = 0.05
"""The share of rows up to which those that ask for another number of images than most count as exceptions."""
MAX_INT = 2**63 - 1
TAIL_SHARE = 0.1
"""Where the job names a size: the share of the rows, at the end of the plan, that goes into smaller shards."""
TAIL_DIVISOR = 4
"""How many times smaller those shards are."""


@dataclass(frozen=True)
class ShardSizes:
    """How large shards are.

    Where the job says nothing, a shard gets one part in `PARTS_OF_SHARE` of a card's share of the images that are left,
    but at least a batch. So shards shrink towards the end of the plan to single batches, and the cards finish together:
    guided self-scheduling (Polychronopoulos and Kuck, IEEE Transactions on Computers 36, 1987). Rows of several images
    fill whole batches only together. Where that takes more of them than the part, a shard is as large as ends the run
    soonest: larger ones have less padding, smaller ones leave cards idle for less time at the end.
    """

    batch_size: int
    """Images of one pipeline call."""
    num_images: int = 1
    """Images that a row of the job usually asks for."""
    rows: int | None = None
    """About how many rows a shard holds, in whole batches; None follows what is left."""
    cards: int = 1
    """Cards that the job may have."""
    groups: Sequence[GroupRows] = ()
    """The row groups, in order, of which cards make `cards` side by side; without them, cards take shards in order."""

    def fits(self, shard: Shard, images: int) -> bool:
        """Whether a shard is not much larger than it would be planned now, with so many images left."""
        num_images = max(1, round(shard.images / shard.rows))
        row = RowSpan(shard.file, shard.start, 1, shard.bucket, num_images)
        wanted: float = self.next(row, _Left(images // num_images, num_images))[1]
        if shard.images != shard.rows:
            wanted = max(wanted, images * MAX_SHARE / self.cards)  # which rows of several images may be cut into
        return shard.rows == 1 or shard.images <= RECUT_FACTOR * wanted

    def next(self, run: RowSpan, left: _Left) -> tuple[int, int]:
        """How much the next shard may hold.

        Args:
            run: its first rows.
            left: what no shard has yet.

        Returns:
            Rows and images; it is full when it has either.
        """
        if self.rows is not None:
            small = left.rows <= left.total_rows * TAIL_SHARE
            unit = self.batch_size // math.gcd(self.batch_size, self.num_images)
            wanted = max(1, self.rows // TAIL_DIVISOR) if small else self.rows
            return max(1, round(wanted / unit)) * unit, MAX_INT
        most = min(MAX_IMAGES, MAX_WORK / run.bucket.work)
        remaining = left.images_at(run)
        images = max(
            min(remaining / (self.cards * PARTS_OF_SHARE), most),
            left.images / max(1, MAX_SHARDS - left.shards_cut),
        )
        num_images = max(1, run.num_images)
        unit = math.lcm(self.batch_size, num_images)
        if left.is_mixed:
            size = self._size_of_different_rows(images, most, remaining, left.padding)
        elif unit > max(images, self.batch_size):
            size = self._size_without_unit(num_images, most, remaining)
        else:
            size = max(1, int(images // unit)) * unit
        return (MAX_INT if run.num_images else size), size  # of rows that ask for no image, as many rows

    def _size_without_unit(self, num_images: int, most: float, remaining: float) -> int:
        """Images of a shard that holds fewer rows than fill whole batches: with those, the cards would make what is
        left, and idle at the end, in the fewest batches."""
        fillings = _fillings(self.batch_size, num_images)
        possible = [filling for filling in fillings if filling.rows * num_images <= most] or fillings[:1]
        best = min(
            possible,
            key=lambda filling: filling.batches * (IDLE_SHARE + remaining / (self.cards * filling.rows * num_images)),
        )
        return best.rows * num_images

    def _size_of_different_rows(self, images: float, most: float, remaining: float, padding: float) -> int:
        """Images of a shard whose rows ask for different numbers: whole batches, of which the last one lacks some on
        average. The number of batches that ends the run soonest is here in closed form."""
        share = remaining / self.cards
        wanted = min(padding + math.sqrt(padding * share / IDLE_SHARE), share * MAX_SHARE, most)
        return max(1, int(max(wanted, images) / self.batch_size)) * self.batch_size


class _Filling(NamedTuple):
    """Rows that fill so many batches as far as they can."""

    rows: int
    batches: int


@functools.lru_cache(maxsize=1024)
def _fillings(batch_size: int, num_images: int) -> list[_Filling]:
    """The numbers of rows of so many images each, up to those that fill whole batches, which have less padding than all
    smaller ones."""
    fillings: list[_Filling] = []
    least = math.inf
    for rows in range(1, batch_size // math.gcd(batch_size, num_images) + 1):
        batches = -(-rows * num_images // batch_size)
        if batches / rows < least:
            least = batches / rows
            fillings.append(_Filling(rows, batches))
    return fillings


@dataclass
class _Left:
    """What of a dataset no shard has yet."""

    total_rows: int
    num_images: int
    order: _SideBySide | None = None
    rows_seen: int = 0
    images_seen: int = 0
    shards_cut: int = 0
    _rows_asking: Counter[int] = field(default_factory=Counter)
    _usual: int = 0
    _squares_seen: int = 0

    def take(self, rows: int, num_images: int) -> None:
        """Notes that a shard has so many rows more, which ask for so many images each."""
        self.rows_seen += rows
        self.images_seen += rows * num_images
        self._squares_seen += rows * num_images**2
        self._rows_asking[num_images] += rows
        if self._rows_asking[num_images] > self._rows_asking[self._usual]:
            self._usual = num_images

    @property
    def is_mixed(self) -> bool:
        """Whether more than a few rows ask for another number of images than most."""
        return self._rows_asking[self._usual] < (1 - MIXED_SHARE) * self.rows_seen

    @property
    def padding(self) -> float:
        """Images that a shard lacks on average when its next row has no room: half of what the row of an image asks
        for on average, beside that image."""
        return max(0.0, self._squares_seen / self.images_seen - 1) / 2 if self.images_seen else 0.0

    @property
    def rows(self) -> int:
        return self.total_rows - self.rows_seen

    @property
    def images(self) -> float:
        """About how many images."""
        return self.rows * self._mean

    def images_at(self, run: RowSpan) -> float:
        """About how many images are left when a card gets to these rows."""
        if self.order is None:
            return self.images
        return self.order.share_left(run) * self.total_rows * self._mean

    @property
    def _mean(self) -> float:
        """Images of a row: those that come ask for as many as those before."""
        return self.images_seen / self.rows_seen if self.rows_seen else self.num_images


class _SideBySide:
    """How far a run is when a card gets to a row. Cards stay in a row group as long as it has shards, so about as many
    groups as there are cards are made side by side, and are then equally far.

    Args:
        groups: the row groups in order.
        cards: how many cards there are.
    """

    def __init__(self, groups: Sequence[GroupRows], cards: int) -> None:
        self._waves: dict[tuple[int, int], tuple[GroupRows, int, int]] = {}
        """For each row group: its rows, how many rows later waves have, and how many its own has."""
        waves, rows_after = -(-len(groups) // cards), 0
        for wave in reversed(range(waves)):
            members = groups[wave * len(groups) // waves : (wave + 1) * len(groups) // waves]
            rows = sum(group.stop - group.start for group in members)
            self._waves |= {(group.file, group.group): (group, rows_after, rows) for group in members}
            rows_after += rows
        self._rows = rows_after

    def share_left(self, run: RowSpan) -> float:
        """The part of all rows that is left when a card gets to these, 0 to 1."""
        group, rows_after, rows = self._waves[run.file, run.group]
        return (rows_after + rows * (group.stop - run.start) / (group.stop - group.start)) / self._rows


def plan_shards(
    runs: Iterable[RowSpan], total_rows: int, sizes: ShardSizes, first: int = 0, others: Iterable[Shard] = ()
) -> Iterator[Shard]:
    """Cuts a dataset into shards.

    Args:
        runs: the rows, in order of file, those of a bucket in order.
        total_rows: rows in all runs together.
        sizes: how large shards are.
        first: number of the first shard.
        others: shards that stay; no new one reaches over their rows, which lie between those of the runs.

    Yields:
        Shards in order of their numbers, which hold every row once.
    """
    numbers = itertools.count(first)
    left = _Left(total_rows, sizes.num_images, _SideBySide(sizes.groups, sizes.cards) if sizes.groups else None)
    opened: dict[Bucket, _OpenShard] = {}
    uncut: Counter[Bucket] = Counter()  # images since a row group's end has closed a shard
    file, group = -1, 0
    starts: dict[tuple[int, Bucket], list[int]] = {}
    for other in sorted(others, key=lambda other: other.start):
        starts.setdefault((other.file, other.bucket), []).append(other.start)

    def is_between(shard: _OpenShard, run: RowSpan) -> bool:
        """Whether rows of another shard are between the last row of this one and the next."""
        in_file = starts.get((run.file, run.bucket), [])
        return bisect_left(in_file, shard.stop) < bisect_left(in_file, run.start)

    def close(shards: Iterable[_OpenShard]) -> Iterator[Shard]:
        for shard in sorted(shards, key=lambda shard: shard.start):
            del opened[shard.bucket]
            yield shard.close(next(numbers))

    for run in runs:
        if run.file != file:
            yield from close(list(opened.values()))
            uncut.clear()
        elif run.group != group and sizes.groups:
            ended = [shard for shard in opened.values() if uncut[shard.bucket] >= BATCHES_BEFORE_CUT * sizes.batch_size]
            yield from close(ended)
            for shard in ended:
                uncut[shard.bucket] = 0
        file, group = run.file, run.group
        if run.bucket in opened and is_between(opened[run.bucket], run):
            yield from close([opened[run.bucket]])
        while run.rows:
            shard = opened.get(run.bucket) or _OpenShard(run, *sizes.next(run, left))
            opened[run.bucket] = shard
            taken = min(run.rows, shard.room(run.num_images))
            images = taken * run.num_images
            shard.rows += taken
            shard.images += images
            left.take(taken, run.num_images)
            uncut[run.bucket] += images
            if taken:
                shard.stop = run.stop_of(taken)
                run = run.after(taken)
            if shard.is_full or (run.rows and not shard.room(run.num_images)):
                left.shards_cut += 1
                yield from close([shard])
    yield from close(list(opened.values()))


@dataclass
class _OpenShard:
    first: RowSpan
    max_rows: int
    max_images: int
    rows: int = 0
    images: int = 0
    stop: int = 0

    @property
    def start(self) -> int:
        return self.first.start

    @property
    def bucket(self) -> Bucket:
        return self.first.bucket

    @property
    def is_full(self) -> bool:
        return self.rows >= self.max_rows or self.images >= self.max_images

    def room(self, num_images: int) -> int:
        """Rows of so many images each that it takes; the first one always."""
        rows = self.max_rows - self.rows
        if num_images:
            rows = min(rows, (self.max_images - self.images) // num_images)
        return rows if self.rows else max(1, rows)

    def close(self, number: int) -> Shard:
        first = self.first
        return Shard(
            number, first.file, first.start, self.stop, first.bucket, self.rows, self.images, group=first.group
        )
