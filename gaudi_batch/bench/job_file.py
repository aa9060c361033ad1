"""The job file that `tune` writes its choice into, and the record beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from gaudi_batch.bench.record import Measurement, encode_record, merged, read_record, record_path
from gaudi_batch.config.edit import with_field
from gaudi_batch.errors import InputError
from gaudi_batch.storage.disk import write_whole
from gaudi_batch.text import short_repr

FIELD = "batch_size"


def is_file(path: str) -> bool:
    """Whether there is a file, or a link to one; False for what can't be a path."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


class JobFile:
    """A job file that can be written.

    Args:
        path: of the file.

    Raises:
        InputError: it, or the record beside it, can't be written; tried without a change to either.
    """

    def __init__(self, path: str) -> None:
        if not is_file(path):
            raise InputError(
                f"job file {short_repr(path)} is no file that could be written; give tune a file on a disk"
            )
        self.path = Path(path)
        self.record = record_path(self.path)
        # A link stays a link, and the file behind it is written.
        self._file, self._record_file = (Path(os.path.realpath(each)) for each in (self.path, self.record))
        if self._record_file.exists() and not self._record_file.is_file():
            raise InputError(f"{str(self.record)!r} is in the place of the record of tune; give it another name")
        for file in (self._file, self._record_file):
            self._require_writable(file)
        self._edited(1)
        read_record(self._record_file)

    def write(self, batch_size: int, measurements: Sequence[Measurement]) -> int | None:
        """Writes the record, and then the batch size into the job file as it is by now.

        Returns:
            The batch size that was there; None if there was none.

        Raises:
            InputError: either can't be written.
        """
        record = encode_record(merged(read_record(self._record_file), measurements))
        self._replace(self._record_file, record)
        before, after, old = self._edited(batch_size)
        if after != before:
            self._replace(self._file, after)
        return old

    def _edited(self, batch_size: int) -> tuple[bytes, bytes, int | None]:
        """The file's content, the same with a batch size, and the batch size that it has."""
        try:
            before = self._file.read_bytes()
            text = before.decode()
            old = (yaml.safe_load(text) or {}).get(FIELD)
            return before, with_field(text, FIELD, batch_size).encode(), old if isinstance(old, int) else None
        except OSError as error:
            raise InputError(f"job file {str(self.path)!r} can't be read: {error.strerror}") from None
        except (yaml.YAMLError, ValueError, AttributeError, RecursionError):
            raise InputError(
                f"job file {str(self.path)!r} can't be changed so that {FIELD} alone is another; give {FIELD} a line of"
                f" its own, as `{FIELD}: 8`"
            ) from None

    def _require_writable(self, file: Path) -> None:
        try:
            if file.exists() and not os.access(file, os.W_OK):
                raise PermissionError(0, "it is read-only")
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):
                pass
        except OSError as error:
            raise InputError(
                f"{str(file)!r} can't be written, and tune would write its result there: {error.strerror}; give it a"
                " job file in a directory that can be written, or the model alone"
            ) from None

    def _replace(self, file: Path, content: bytes) -> None:
        def write(part: str) -> None:
            Path(part).write_bytes(content)
            if file.exists():
                shutil.copymode(file, part)

        try:
            write_whole(file, write, lambda: True, create=False)
        except OSError as error:
            raise InputError(f"{str(file)!r} can't be written: {error.strerror}") from None
