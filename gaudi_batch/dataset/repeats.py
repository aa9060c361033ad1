"""Finds ids that repeat: rows with one id get the same seeds, which is the rule but seldom intended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from gaudi_batch.dataset.columns import plain
from gaudi_batch.dataset.rows import derived_seed

MAX_IDS = 10_000_000
"""Most ids that are compared, at 8 bytes each."""
_WAITING_IDS = 1 << 20
_WAITING_BYTES = 64 << 20
"""Bytes of ids that are collected before they are sorted in among the others."""


class RepeatedIds:
    """Counts rows that share an id with another row, in bounded memory.

    Ids are compared by hashes of 64 bits: among ten million different ids, two agree by chance in three runs of a
    million.

    Args:
        most: ids that are compared at most.
    """

    def __init__(self, most: int = MAX_IDS) -> None:
        self.seen = 0
        """Number of ids that were given."""
        self._most = most
        self._taken = 0
        self._sorted: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._buffered: list[pa.Array] = []
        self._buffered_ids = self._buffered_bytes = 0
        self._example: str | None = None

    def add(self, ids: pa.Array | pa.ChunkedArray) -> None:
        """Takes in the ids of some rows, each row's once.

        Args:
            ids: of rows that have no seed of their own; of any type. A null is no id and is passed over.
        """
        ids = ids.drop_null()
        self.seen += len(ids)
        ids = _binary(ids.slice(0, self._most - self._taken))
        self._taken += len(ids)
        self._buffered.append(ids)
        self._buffered_ids += len(ids)
        self._buffered_bytes += ids.nbytes
        if self._buffered_ids >= _WAITING_IDS or self._buffered_bytes >= _WAITING_BYTES:
            self._sort_in()

    def add_manifest(self, table: pa.Table, run_seed: int, may_have_seeds: bool) -> None:
        """Takes in the rows of a manifest, those left out whose seeds are their own.

        Args:
            table: of a manifest; a row's images are in one.
            run_seed: seed of the run.
            may_have_seeds: whether the prompts have a column of seeds.
        """
        image = table.column("image_index")
        table = table.filter(pc.or_kleene(pc.is_null(image), pc.equal(image, 0)))
        ids = table.column("id")
        if may_have_seeds:
            seeds = table.column("seed").to_pylist()
            pairs = zip(ids.to_pylist(), seeds, strict=True)
            ids = ids.filter(
                pa.array([derived_seed(run_seed, identity, 0) == seed for identity, seed in pairs], pa.bool_())
            )
        self.add(ids)

    def describe(self) -> str | None:
        """One line: how many rows share an id with another, one such id, and the way out; None if no id repeats."""
        rows = self.rows()
        if not rows:
            return None
        compared = f"; the first {self._taken} ids were compared" if self.seen > self._taken else ""
        return (
            f"{rows} of {self._taken} rows share an id with another row, such as {self._example!r:.80}{compared}. Rows"
            " of one id get the same seeds; to give each its own, make the column id unique, name one that is"
            " (--columns id=NAME), add a column seed, or have no column id"
        )

    def rows(self) -> int:
        """How many of the compared rows share an id with another."""
        self._sort_in()
        same = self._sorted[1:] == self._sorted[:-1]
        return int(np.count_nonzero(np.append(same, False) | np.append(False, same)))

    def _sort_in(self) -> None:
        ids = [value for array in self._buffered for value in array.to_pylist()]
        self._buffered.clear()
        self._buffered_ids = self._buffered_bytes = 0
        hashes = np.fromiter(map(hash, ids), np.int64, len(ids))
        # A stable sort is fast where most is sorted already.
        self._sorted = np.sort(np.concatenate([self._sorted, hashes]), kind="stable")
        if self._example is None:
            twice = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
            if len(twice):
                self._example = ids[int(np.isin(hashes, twice).argmax())].decode("utf-8", "replace")


def _binary(ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Ids as bytes, equal if the ids are equal."""
    ids = ids.cast(plain(pa.schema([("id", ids.type)])).field("id").type)
    try:
        if not pa.types.is_binary(ids.type):
            ids = ids.cast(pa.large_string())
        return ids.cast(pa.large_binary())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.array([str(value).encode("utf-8", "replace") for value in ids.to_pylist()], pa.large_binary())
