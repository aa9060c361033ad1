"""What `run` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gaudi_batch.layout import JOINED
from gaudi_batch.storage.store import Storage

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run.

    >>> from gaudi_batch import JobConfig, run
    >>> result = run(JobConfig(prompts="prompts.parquet", output="out", device="simulated"))
    >>> result.exit_code, result.summary["images"]
    (0, 4)
    >>> result.manifest(columns=["status"]).column("status").to_pylist()
    ['ok', 'ok', 'ok', 'ok']
    >>> list(result.failed_rows())
    []
    """

    output: str = field(repr=False)
    """The place of its files: the absolute path of a local directory, else the job's own URL, with its secrets if it
    has any."""
    summary: dict[str, Any]
    """What summary.json says."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """fsspec options of the output's storage, as the job has them."""

    @property
    def exit_code(self) -> int:
        """0: every image is made; 3: done, and some rows failed."""
        return 3 if self.summary["failed_rows"] else 0

    @property
    def manifest_path(self) -> str:
        """Path of `manifest.parquet`, or its URL with whatever secrets `output` has."""
        return f"{self.output}/manifest.parquet"

    def manifest(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The joined manifest: a row for each image and each failed row. All of it is in memory at once.

        Args:
            columns: which columns; None is all.

        Raises:
            StorageError: it can't be read.
        """
        import pyarrow as pa

        names = None if columns is None else list(columns)
        return pa.concat_tables(file.read(columns=names) for file in self._opened())

    def failed_rows(self) -> Iterator[dict[str, Any]]:
        """The failed rows of the manifest, each as a dictionary with its `error`. One row group of the manifest is in
        memory at a time.

        Raises:
            StorageError: it can't be read.
        """
        import pyarrow.compute as pc

        for file in self._opened():
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                yield from group.filter(pc.equal(group.column("status"), "failed")).to_pylist()

    def _opened(self) -> Iterator[pq.ParquetFile]:
        """The file, or one after the other those of the directory."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        storage = Storage(self.output, self.storage_options, read_only=True)
        names = storage.names(JOINED)
        for path in [JOINED] if names in ([], [JOINED]) else [f"{JOINED}/{name}" for name in names]:
            with pq.ParquetFile(pa.PythonFile(storage.open(path), mode="r")) as file:
                yield file
