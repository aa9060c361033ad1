"""Where models come from that are not on a node's disk: stores, and the hub, whose own library keeps them."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

from gaudi_batch.errors import StorageError
from gaudi_batch.pipelines.digests import digest_of_blob, is_whole
from gaudi_batch.pipelines.fetching import Files, LocalModel, ModelFile, fetch_files, wrong_files
from gaudi_batch.pipelines.model_files import INDEX, components_of, is_loaded
from gaudi_batch.pipelines.sources import ModelInfo
from gaudi_batch.storage.disk import write_whole
from gaudi_batch.storage.listing import Entry, md5_of
from gaudi_batch.storage.store import Storage
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin")
"""What the names of weights end with."""
HUB_TIMEOUT_S = 10.0
"""Seconds that the hub may take to answer; without an answer, what is here has to do."""
CHUNK = 64 * 1024**2
"""Bytes of a file that a store is asked for at a time."""


class StoreOrigin:
    """A model in a store.

    Args:
        revision: of the model.
        storage: where it lies.
        entries: what it has there, by path.
    """

    readers = 4

    def __init__(self, revision: str, storage: Storage, entries: Mapping[str, Entry]) -> None:
        self.revision = revision
        self._storage = storage
        self._entries = entries

    def present(self) -> None:
        """Nothing keeps it here but the cache itself."""

    def is_near(self) -> bool:
        """It is not."""
        return False

    def files(self) -> Files:
        """The model's files."""
        return {path: ModelFile(entry.size, _md5(entry)) for path, entry in self._entries.items()}

    def fetch(self, directory: Path, files: Files) -> LocalModel:
        """See `Origin`. That the store has no other files by now is asked when all are here, since only few stores tell
        a digest. Where one seems to and it does not fit, the file is fetched a second time: an ETag of an encrypted
        object looks like an MD5 and is none."""

        def read(path: str, take: Callable[[bytes], object]) -> None:
            for start in range(0, files[path].size, CHUNK):
                take(self._storage.get_range(path, start, min(start + CHUNK, files[path].size)))

        fetched = fetch_files(files, directory, read)
        if wrong := wrong_files(files, fetched, directory):
            log.info("%s: %s came with other digests than their ETags seem to be", self._storage.url, ", ".join(wrong))
            fetched = fetch_files(files, directory, read)
        changed = sorted(path for path, entry in self._entries.items() if self._storage.entry(path) != entry)
        if changed:
            shutil.rmtree(directory, ignore_errors=True)
            raise StorageError(
                f"{self._storage.url}: {', '.join(changed[:5])} changed since the job began; begin a run with the model"
                " that is there now in another output",
                refused=True,
            )
        return LocalModel(directory, fetched)


class HubOrigin:
    """A model of the hub, which huggingface_hub keeps in its own cache. A note lists its files there, once it is there
    as a whole, since that cache also keeps a part of a model in the place of the model.

    Args:
        model: the model.
        notes: the directory of the notes.
    """

    readers = 1

    def __init__(self, model: ModelInfo, notes: Path) -> None:
        self.revision = model.revision
        self._model = model
        self._note = notes / f"{model.revision}.hub"

    def present(self) -> LocalModel | None:
        """See `Origin`."""
        try:
            noted = json.loads(self._note.read_text())
            directory = Path(noted["directory"])
        except (OSError, ValueError, KeyError):
            return None
        files = {path: ModelFile(*file) for path, file in noted["files"].items()}
        is_there = all(is_whole(directory / path, file.size, None) for path, file in files.items())
        return LocalModel(directory, files) if is_there else None

    def is_near(self) -> bool:
        """Whether the hub's cache has some weights of it: whoever has fetched some has fetched all, as a rule."""
        from huggingface_hub import try_to_load_from_cache

        index = try_to_load_from_cache(self._model.path, "model_index.json", revision=self.revision)
        return isinstance(index, str) and any(path.suffix in WEIGHTS for path in Path(index).parent.rglob("*"))

    def files(self) -> Files:
        """None, as they take no room of the cache."""
        return {}

    def fetch(self, directory: Path, files: Files) -> LocalModel:
        """See `Origin`; those files are fetched that the model's class of diffusers needs. Where the hub can't be
        reached, what is here is taken, and may be a part.

        Raises:
            StorageError: the hub gives nothing and there is nothing here.
        """
        import diffusers
        from huggingface_hub import HfApi, constants

        model, names, reason = self._model, None, ""
        try:
            info = HfApi().model_info(model.path, revision=model.revision, timeout=HUB_TIMEOUT_S)
            names = [file.rfilename for file in info.siblings or ()]
        except Exception as error:
            reason = one_line(error, 300)
        try:
            place = Path(
                diffusers.DiffusionPipeline.download(
                    model.path,
                    revision=model.revision,
                    use_safetensors=model.use_safetensors or None,
                    trust_remote_code=False,
                    local_files_only=names is None,
                )
            )
        except Exception as error:
            raise StorageError(
                f"model {model.name!r}: the hub gives it not to node {socket.gethostname()}:"
                f" {reason or one_line(error, 300)}; open the network to {constants.ENDPOINT}, set HF_TOKEN there for a"
                f" gated model, or fetch it beforehand: hf download {model.path}",
                refused=True,
            ) from error
        files_here = _files_of(place)
        is_whole = names is not None and _has_all(place, names)
        if is_whole:
            note = json.dumps({"directory": str(place), "files": files_here})
            with contextlib.suppress(OSError):  # a cache that can only be read
                write_whole(self._note, lambda part: Path(part).write_text(note), lambda: True, create=False)
        return LocalModel(place, files_here, is_whole)


def _has_all(directory: Path, names: list[str]) -> bool:
    """Whether a snapshot of the hub has what diffusers loads of a repository's files: it may have been taken while the
    hub did not answer, and says nothing of that.

    Args:
        directory: the snapshot.
        names: the repository's files.
    """
    index = json.loads((directory / INDEX).read_text())
    for component in components_of(index):
        own = [name for name in names if name.startswith(f"{component}/")]
        if any(Path(name).suffix in WEIGHTS for name in own):
            here = [path.name for path in (directory / component).iterdir()]
            kinds = [kind for kind in WEIGHTS if any(_is_weight(name, kind) for name in here)]
            if not kinds:
                return False
            indexes = (directory / component).glob(f"*{kinds[0]}.index.json")
            maps = [json.loads(path.read_text())["weight_map"] for path in indexes]
            wanted = {f"{component}/{name}" for shards in maps for name in shards.values()}
        else:
            wanted = {name for name in own if is_loaded(Path(name).name, use_safetensors=True)}
        if not all((directory / name).is_file() for name in wanted):
            return False
    return True


def _is_weight(name: str, kind: str) -> bool:
    """Whether a file has weights of a kind that are loaded, which those of a variant are not."""
    return Path(name).suffix == kind and is_loaded(name, use_safetensors=kind == ".safetensors")


def _md5(entry: Entry) -> str | None:
    digest = md5_of(entry.mark)
    return None if digest is None else f"md5:{digest}"


def _files_of(directory: Path) -> dict[str, ModelFile]:
    """The files of a snapshot in the hub's cache, each a link to a file that is named after its digest."""
    files = {}
    for path in directory.rglob("*"):
        if path.is_file():
            blob = path.resolve()
            files[path.relative_to(directory).as_posix()] = ModelFile(blob.stat().st_size, digest_of_blob(blob.name))
    return files
