"""Pushes an export to a dataset repository of Hugging Face's hub, by huggingface_hub's own resumable upload."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.export.card import GRID
from gaudi_batch.export.export import CARD, Export
from gaudi_batch.export.hub import from_hub, set_timeouts, upload_until_done
from gaudi_batch.export.plan import HUB_FILES, HUB_FOLDER_FILES
from gaudi_batch.export.record import RECORD, difference
from gaudi_batch.layout import METADATA
from gaudi_batch.output.manifest import FILES
from gaudi_batch.storage.reading import PART_BYTES
from gaudi_batch.storage.scratch import scratch_errors
from gaudi_batch.storage.store import Storage

log = logging.getLogger(__name__)

UPLOAD_CACHE = ".cache/huggingface/upload"
"""Where huggingface_hub notes how far an upload has come, in the folder itself."""
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_OF_HUB = (".gitattributes",)
"""Files that the hub makes itself."""


def prepare(name: str) -> None:
    """Turns off the hub's newer protocol for large files, which needs a server of its own, where all hubs take Git LFS;
    before anything imports huggingface_hub; sets timeouts. Raises InputError if a text can't be the name of a
    repository."""
    if not _REPOSITORY.fullmatch(name):
        raise InputError(f"--push {name!r}: must be owner/name")
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    set_timeouts()


def require_few_files(export: Export) -> None:
    """Raises InputError if an export has more files than the hub takes."""
    if export.format == FILES and len(export.rows) + 10 > HUB_FILES:
        raise InputError(
            f"--push: {len(export.rows)} images as files are more than the {HUB_FILES} files that the hub takes in a"
            " repository; --format parquet or webdataset packs them"
        )
    if export.format != FILES and len(export.parts) > HUB_FOLDER_FILES:
        raise InputError(
            f"--push: {len(export.parts)} objects are more than the {HUB_FOLDER_FILES} files that the hub takes in a"
            " folder; a larger --target-size makes fewer"
        )


def claim(export: Export, repository: str, *, private: bool) -> str:
    """Makes sure that a repository is for an export: makes it if it is not there, and puts the export's record into it
    if it has nothing yet; returns its URL.

    Args:
        export: begun.
        repository: owner/name.
        private: whether it is private.

    Raises:
        InputError: the hub refuses, or the repository has something else, which would be written over, or which loaders
            would take for a part of the set.
        StorageError: the hub can't be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()

    def claimed() -> str:
        url = str(api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True))
        info = api.dataset_info(repository)
        if private and not info.private:
            raise InputError(f"--private: the repository {repository!r} is there, and is public")
        present = {file.rfilename for file in info.siblings or ()}
        if RECORD not in present:
            if others := sorted(present - set(_OF_HUB)):
                raise InputError(
                    f"--push {repository!r}: the repository has other files, as {others[0]!r}; remove them, or name"
                    " another"
                )
            # Refused if somebody else commits in the meantime.
            record = export.target.get(RECORD) or b""
            api.upload_file(
                path_or_fileobj=record,
                path_in_repo=RECORD,
                repo_id=repository,
                repo_type="dataset",
                parent_commit=info.sha,
            )
            return url
        path = api.hf_hub_download(repository, RECORD, repo_type="dataset", revision=info.sha)
        if told := difference(Path(path).read_bytes(), export.digest, export.cuts):
            raise InputError(f"--push {repository!r}: the repository has {told}; remove its files, or name another")
        if others := sorted(present - {*_OF_HUB, RECORD, CARD, GRID, *_paths(export)}):
            raise InputError(f"--push {repository!r}: the repository has other files, as {others[0]!r}; remove them")
        return url

    return from_hub(repository, claimed)


def push(export: Export, repository: str, url: str) -> None:
    """Pushes an export that is written.

    Args:
        export: on a disk, or in a store, from which it is brought here first.
        repository: owner/name, which is claimed.
        url: of it.

    Raises:
        InputError: the hub refuses.
        StorageError: the hub can't be reached, or storage failed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _staged(export, url) as folder:
        log.info("pushing %s", url)
        upload_until_done(
            lambda: api.upload_large_folder(
                repo_id=repository, repo_type="dataset", folder_path=folder, print_report=False
            ),
            repository,
            folder / UPLOAD_CACHE,
        )
    present = set(from_hub(repository, lambda: api.list_repo_files(repository, repo_type="dataset")))
    if missing := sorted(set(_paths(export)) - present):
        raise StorageError(f"--push {repository!r}: {len(missing)} files are not there, the first {missing[0]!r}")


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
    with this repository. The next try finds it. Files of an export in a store are brought here.

    Raises:
        StorageError: there is no room, or the folder is somebody else's.
    """
    target = export.target
    name = f"push-{hashlib.sha256(f'{url} {export.digest}'.encode()).hexdigest()[:16]}"
    is_here = target.local
    folder = Path(target.place, ".gaudi-batch", name) if is_here else Path(tempfile.gettempdir(), f"gaudi-batch-{name}")
    with scratch_errors("bring the export here"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise StorageError(f"{folder} is somebody else's; set TMPDIR to a directory of your own", refused=True)
        paths = list(_paths(export))
        wanted = {folder / PurePosixPath(path) for path in paths}
        for entry in folder.rglob("*"):
            is_noted = entry.relative_to(folder).parts[0] == ".cache"
            if not is_noted and entry not in wanted and (entry.is_symlink() or entry.is_file()):
                entry.unlink()
        for path in paths:
            local = folder / PurePosixPath(path)
            local.parent.mkdir(parents=True, exist_ok=True)
            if not is_here:
                _bring(target, path, local)
                continue
            origin = Path(target.place, path).resolve()
            if not (local.is_symlink() and local.readlink() == origin):
                local.unlink(missing_ok=True)
                local.symlink_to(origin)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _bring(storage: Storage, path: str, local: Path) -> None:
    entry = storage.entry(path)
    if entry is None:
        return
    # The card is the one file that another export of the same images may have with other bytes.
    is_small = entry.size <= PART_BYTES
    if (
        local.exists()
        and local.stat().st_size == entry.size
        and not (is_small and local.read_bytes() != storage.get(path))
    ):
        return
    part = local.with_name(f".{local.name}.part")
    with part.open("wb") as file:
        for start in range(0, entry.size, PART_BYTES):
            file.write(storage.get_range(path, start, min(entry.size, start + PART_BYTES)))
    part.replace(local)
