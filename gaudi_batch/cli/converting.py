"""The command `prompts`: where its input lies and where its file goes."""

from __future__ import annotations

import argparse

from gaudi_batch.dataset.convert import Converted, convert
from gaudi_batch.dataset.tables import open_table
from gaudi_batch.errors import InputError
from gaudi_batch.redaction import redact
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import read_yaml

RETRY_TIMEOUT_S = 60.0
"""Seconds for which storage that fails is tried again."""


def convert_prompts(parsed: argparse.Namespace) -> Converted:
    """Makes the file. Raises InputError or StorageError."""
    options = _options(parsed.storage_options, "--storage-options")
    of_source = _options(parsed.prompts_storage_options, "--prompts-storage-options")
    if of_source is None and _protocol(parsed.source) == _protocol(parsed.target):
        of_source = options
    source_place, source = _split(parsed.source)
    target_place, target = _split(parsed.target)
    if not target.endswith(".parquet"):
        raise InputError(f"{redact(parsed.target)!r}: the name must end with .parquet")
    storage = Storage(target_place, options, RETRY_TIMEOUT_S)
    if not parsed.overwrite and storage.entry(target) is not None:
        raise InputError(f"{redact(parsed.target)!r} is there already; --overwrite replaces it")
    prompts = Storage(source_place, of_source, RETRY_TIMEOUT_S, read_only=True)
    if prompts.entry(source) is None:
        raise InputError(f"{redact(parsed.source)!r}: there is no such file")
    columns = _options(parsed.columns, "--columns") or {}
    return convert(open_table(prompts, source, parsed.format), storage, target, columns)


def _options(text: str | None, flag: str) -> dict[str, str] | None:
    return read_yaml(text, dict, flag) if text else None


def _protocol(url: str) -> str:
    return url.partition("://")[0] if "://" in url else ""


def _split(url: str) -> tuple[str, str]:
    """The directory of a file and its name in it."""
    place, slash, name = url.rpartition("/")
    if not name:
        raise InputError(f"{redact(url)!r}: must name a file")
    return (place or "/") if slash else ".", name
