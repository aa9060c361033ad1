"""Pushes an export to a dataset repository of Hugging Face's hub, by huggingface_hub's own resumable upload."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.export.card import GRID
from gaudi_batch.export.export import CARD, RECORD, RETRY_TIMEOUT_S, Export
from gaudi_batch.export.plan import HUB_FILES
from gaudi_batch.layout import METADATA
from gaudi_batch.output.manifest import FILES
from gaudi_batch.storage.reading import PART_BYTES
from gaudi_batch.storage.scratch import scratch_errors
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

UPLOAD_CACHE = ".cache/huggingface/upload"
"""Where huggingface_hub notes how far an upload has come, in the folder itself."""
WAIT_S = 0.2
_REFUSED = re.compile(r"\b4(?!08|09|12|25|29)\d\d (Client Error|[A-Z])|Invalid metadata")
"""Errors that stay."""
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_OF_HUB = (".gitattributes",)
"""Files that the hub makes itself."""


def prepare(name: str) -> None:
    """Turns off the hub's newer protocol for large files, which needs a server of its own, where all hubs take Git LFS;
    before anything imports huggingface_hub. Raises InputError if a text can't be the name of a repository."""
    if not _REPOSITORY.fullmatch(name):
        raise InputError(f"--push {name!r}: must be owner/name")
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")


def require_few_files(export: Export) -> None:
    """Raises InputError if an export has more files than the hub takes."""
    if export.format == FILES and len(export.rows) + 10 > HUB_FILES:
        raise InputError(
            f"--push: {len(export.rows)} images as files are more than the {HUB_FILES} files that the hub takes in a"
            " repository; --format parquet or webdataset packs them"
        )


def push(export: Export, repository: str, *, private: bool) -> str:
    """Pushes an export that is written; returns its URL.

    Args:
        export: on a disk, or in a store, from which it is brought here first.
        repository: owner/name; made if it is not there.
        private: whether a repository that is made is private.

    Raises:
        InputError: the hub refuses, or the repository has other files.
        StorageError: the hub can't be reached, or storage failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = str(api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True))
        _claim(export, repository, api)
        with _staged(export, url) as folder:
            log.info("pushing %s", url)
            _upload(
                lambda: api.upload_large_folder(
                    repo_id=repository,
                    repo_type="dataset",
                    folder_path=folder,
                    private=private,
                    print_report=False,
                ),
                repository,
                folder / UPLOAD_CACHE,
            )
        present = set(api.list_repo_files(repository, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"--push {repository!r}: the hub refuses: {one_line(error, 300)}; is HF_TOKEN set?") from None
    except (OSError, OfflineModeIsEnabled) as error:
        raise StorageError(f"--push {repository!r}: the hub can't be reached: {one_line(error, 300)}") from None
    if missing := sorted(set(_paths(export)) - present):
        raise StorageError(f"--push {repository!r}: {len(missing)} files are not there, the first {missing[0]!r}")
    return url


class _Errors(logging.Handler):
    """Keeps what huggingface_hub logs of an upload that fails: it tries again for ever."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""
        self.since: float | None = None
        """When the first was logged since `forget`."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        message = record.getMessage()
        if message.startswith("Failed"):
            self.last = message
            self.since = self.since or time.monotonic()

    def forget(self) -> None:
        """The upload goes on."""
        self.since = None


def _upload(upload: Callable[[], None], repository: str, cache: Path) -> None:
    """Runs an upload until it has ended, has failed for RETRY_TIMEOUT_S without any progress, or is refused.

    Args:
        upload: does it.
        repository: where to.
        cache: where huggingface_hub notes how far it has come.
    """
    errors, ended = _Errors(), []
    logger = logging.getLogger("huggingface_hub")
    thread = threading.Thread(target=lambda: ended.append(_outcome(upload)), name="push", daemon=True)
    logger.addHandler(errors)
    try:
        thread.start()
        noted = _noted(cache)
        while not ended:
            thread.join(WAIT_S)
            if (now_noted := _noted(cache)) != noted:
                noted = now_noted
                errors.forget()
            if errors.since is not None:
                if _REFUSED.search(errors.last):
                    raise InputError(f"--push {repository!r}: the hub refuses: {one_line(errors.last, 300)}")
                if time.monotonic() - errors.since > RETRY_TIMEOUT_S:
                    raise StorageError(
                        f"--push {repository!r}: tried for {RETRY_TIMEOUT_S:.0f} s: {one_line(errors.last, 300)}; the"
                        " same command goes on"
                    )
    finally:
        logger.removeHandler(errors)
    if ended[0] is not None:
        raise ended[0]


def _outcome(upload: Callable[[], None]) -> Exception | None:
    try:
        upload()
    except Exception as error:
        return error
    return None


def _noted(cache: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_mtime_ns) for path in cache.rglob("*.metadata")}


def _claim(export: Export, repository: str, api: HfApi) -> None:
    """Puts the record of an export into a repository that has nothing yet. Raises InputError if it has something else:
    loaders would take it for a part of this set, or it would be written over."""
    present = set(api.list_repo_files(repository, repo_type="dataset"))
    record = export.target.get(RECORD) or b""
    if RECORD in present:
        path = api.hf_hub_download(repository, RECORD, repo_type="dataset")
        if json.loads(Path(path).read_bytes()).get("digest") != export.digest:
            raise InputError(f"--push {repository!r}: the repository has another export; name another repository")
    others = sorted(present - {*_OF_HUB, *((RECORD, *_paths(export)) if RECORD in present else ())})
    if others:
        raise InputError(f"--push {repository!r}: the repository has other files, as {others[0]!r}; name another")
    if RECORD not in present:
        api.upload_file(path_or_fileobj=record, path_in_repo=RECORD, repo_id=repository, repo_type="dataset")


def _paths(export: Export) -> Iterator[str]:
    """The files of an export that are pushed beside its record."""
    yield from (path for path in (CARD, GRID) if export.target.entry(path) is not None)
    for task in export.tasks:
        if export.format != FILES:
            yield task.part.path
        else:
            yield from (f"{task.part.path}/{name}" for name in task.names)
    if export.format == FILES:
        yield from (f"{split}/{METADATA}" for split in export.splits)


@contextlib.contextmanager
def _staged(export: Export, url: str) -> Iterator[Path]:
    """A folder on this disk with the files of an export and no others, where huggingface_hub notes how far it has come
    with this repository. The next try finds it. Files of an export in a store are brought here."""
    target = export.target
    name = f"push-{hashlib.sha256(f'{url} {export.digest}'.encode()).hexdigest()[:16]}"
    is_here = target.local
    folder = Path(target.place, ".gaudi-batch", name) if is_here else Path(tempfile.gettempdir(), f"gaudi-batch-{name}")
    with scratch_errors("bring the export here"):
        for path in _paths(export):
            local = folder / PurePosixPath(path)
            local.parent.mkdir(parents=True, exist_ok=True)
            if not is_here:
                _bring(target, path, local)
            elif not local.is_symlink():
                local.symlink_to(Path(target.place, path).resolve())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _bring(storage: Storage, path: str, local: Path) -> None:
    entry = storage.entry(path)
    if entry is None or (local.exists() and local.stat().st_size == entry.size):
        return
    part = local.with_name(f".{local.name}.part")
    with part.open("wb") as file:
        for start in range(0, entry.size, PART_BYTES):
            file.write(storage.get_range(path, start, min(entry.size, start + PART_BYTES)))
    part.replace(local)
