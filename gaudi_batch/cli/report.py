"""The command `report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import quote

from gaudi_batch.errors import InputError
from gaudi_batch.output.place import refuse_file
from gaudi_batch.output.reader import OutputReader
from gaudi_batch.output.records import read_records
from gaudi_batch.reporting.report.report import make_report
from gaudi_batch.reporting.status import read_status
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import read_yaml

RETRY_TIMEOUT_S = 60.0
"""Seconds for which an output that fails is tried again."""


def write_report(parsed: argparse.Namespace) -> str:
    """Writes the page; returns what to print.

    Raises:
        InputError: there is no run in the output, or the page can't be written.
        StorageError: storage failed.
    """
    target = Path(parsed.to)
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"--to {parsed.to!r}: is no file in a directory that is there")
    options = read_yaml(parsed.storage_options, dict, "--storage-options") if parsed.storage_options else {}
    storage = Storage(parsed.output, options, RETRY_TIMEOUT_S, read_only=True)
    refuse_file(storage)
    reader = OutputReader(storage)
    status = read_status(reader)
    page = make_report(read_records(reader), status["state"], status["reason"], _base(storage, target))
    try:
        target.write_bytes(page)
    except OSError as error:
        raise InputError(f"--to {parsed.to!r}: can't be written: {error.strerror}") from None
    return f"{target}: {status['state']}"


def _base(storage: Storage, target: Path) -> str | None:
    """The address of the output, for links in the page; None for a store, whose objects browsers can't open."""
    if not storage.local:
        return None
    root = Path(storage.root).resolve()
    return "" if target.resolve().parent == root else f"file://{quote(str(root))}"
