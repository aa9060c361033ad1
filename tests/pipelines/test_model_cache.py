"""Models in stores: fetched once a node, there as a whole or not at all, and within the space that they may take."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import StoreServer, put_into_hub_cache

from gaudi_batch import InputError, JobConfig
from gaudi_batch.errors import StorageError
from gaudi_batch.pipelines.base import Item
from gaudi_batch.pipelines.model_cache import NO_PEERS, Files, LocalModel, ModelCache, ModelFile, Origin, PeerLost
from gaudi_batch.pipelines.model_files import entries_of_model
from gaudi_batch.pipelines.origins import HubOrigin, StoreOrigin
from gaudi_batch.pipelines.sources import BUILTIN_MODELS, describe_model
from gaudi_batch.plan import Bucket
from gaudi_batch.storage.store import Storage

SHAPES = BUILTIN_MODELS / "shapes"


def config(model: str, **fields: Any) -> JobConfig:
    return JobConfig(prompts="p", model=model, **{"output": "o", "device": "cpu"} | fields)


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    """A directory with the built-in model's files, read as a store is."""
    shutil.copytree(SHAPES, tmp_path / "store")
    return Storage(str(tmp_path / "store"), retry_timeout_s=1.0)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was asked for."""
    counts: Counter[str] = Counter()
    get, lock = Storage.get_range, threading.Lock()

    def counted(self: Storage, path: str, start: int, stop: int) -> bytes:
        with lock:
            counts[path] += 1
        return get(self, path, start, stop)

    monkeypatch.setattr(Storage, "get_range", counted)
    return counts


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_cards_of_a_node_fetch_a_model_once(store: Storage, tmp_path: Path, fetched: Counter[str]) -> None:
    files = entries_of_model(store)
    caches = [ModelCache(tmp_path / "cache", 10**12) for _ in range(8)]
    with ThreadPoolExecutor(len(caches)) as pool:
        places = set(pool.map(lambda cache: cache.get(StoreOrigin("revision", store, files), NO_PEERS), caches))
    assert len(places) == 1
    assert fetched == Counter(files.keys())
    assert content(places.pop()) == {path: (Path(store.root) / path).read_bytes() for path in files}


def test_what_a_killed_process_has_left_is_completed(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    files, rename, killed = entries_of_model(store), Path.rename, ModelCache(tmp_path / "cache", 10**12)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        killed.get(StoreOrigin("revision", store, files), NO_PEERS)
    killed.release()
    monkeypatch.setattr(Path, "rename", rename)
    assert not (tmp_path / "cache/revision").exists()
    torn = tmp_path / "cache/.revision/unet/config.json"
    torn.write_bytes(torn.read_bytes()[:-1])
    fetched.clear()
    place = ModelCache(tmp_path / "cache", 10**12).get(StoreOrigin("revision", store, files), NO_PEERS)
    assert fetched == Counter({"unet/config.json": 1})
    assert content(place) == {path: (Path(store.root) / path).read_bytes() for path in files}


def test_a_model_that_changes_meanwhile_is_not_taken(store: Storage, tmp_path: Path) -> None:
    files = entries_of_model(store)
    (Path(store.root) / "unet/config.json").write_bytes(b"{}")
    with pytest.raises(StorageError, match=r"unet/config\.json"):
        ModelCache(tmp_path / "cache", 10**12).get(StoreOrigin("revision", store, files), NO_PEERS)
    assert not (tmp_path / "cache/revision").exists()


def test_models_that_nobody_uses_make_room_the_least_recently_used_first(store: Storage, tmp_path: Path) -> None:
    files, root = entries_of_model(store), tmp_path / "cache"
    size = sum(entry.size for entry in files.values())
    caches = {revision: ModelCache(root, 10**12) for revision in ("old", "older", "used")}
    for age, (revision, cache) in enumerate(caches.items()):
        cache.get(StoreOrigin(revision, store, files), NO_PEERS)
        os.utime(root / revision, (1000 - age, 1000 - age))
        if revision != "used":
            cache.release()
    ModelCache(root, 3 * size).get(StoreOrigin("new", store, files), NO_PEERS)
    assert {path.name for path in root.iterdir() if path.is_dir()} == {"old", "used", "new"}
    ModelCache(root, size).get(StoreOrigin("newer", store, files), NO_PEERS)
    assert (root / "used").is_dir(), "a process has loaded it"
    assert not (root / "old").exists()


class Giver:
    """Another node that has a model, and the turn of this one.

    Args:
        model: what it has.
        fails: for each of its files how often it fails to give it, or what it gives in its place.
    """

    def __init__(self, model: LocalModel, fails: dict[str, int | bytes] | None = None) -> None:
        self.model = model
        self.fails = fails or {}
        self.turns: list[str] = []
        self.offered: list[str] = []
        self.offered_in_turn = False

    @contextlib.contextmanager
    def turn(self, origin: Origin) -> Iterator[Giver]:
        self.turns.append(origin.revision)
        yield self
        self.offered_in_turn = bool(self.offered)

    def offer(self, revision: str, model: LocalModel) -> None:
        self.offered.append(revision)

    def files(self) -> Files:
        return self.model.files

    def read(self, path: str, size: int, file: Callable[[bytes], object]) -> None:
        failure = self.fails.pop(path, 0)
        if isinstance(failure, bytes):
            file(failure)
            return
        content = (self.model.directory / path).read_bytes()
        file(content[: size // 2])
        if failure:
            self.fails[path] = failure - 1
            raise PeerLost("it died")
        file(content[size // 2 :])


@pytest.mark.parametrize("fails", [{}, {"unet/config.json": 1}, {"unet/config.json": b"torn"}], ids=str)
def test_a_node_fetches_a_model_from_another_and_again_where_that_fails(
    store: Storage, tmp_path: Path, fetched: Counter[str], fails: dict[str, int | bytes]
) -> None:
    origin = StoreOrigin("revision", store, entries_of_model(store))
    giver = Giver(LocalModel(Path(store.root), origin.files()), dict(fails))
    place = ModelCache(tmp_path / "cache", 10**12).get(origin, giver)
    assert content(place) == {path: (Path(store.root) / path).read_bytes() for path in origin.files()}
    assert not fetched
    assert len(giver.turns) == 1 + len(fails)
    assert set(giver.offered) == {"revision"}
    assert giver.offered_in_turn, "who waits would ask the origin"
    again = ModelCache(tmp_path / "cache", 10**12).get(origin, giver)
    assert again == place
    assert len(giver.offered) == 3
    assert len(giver.turns) == 1 + len(fails)


@pytest.mark.torch
def test_a_model_that_the_hubs_cache_has_is_taken_from_there_and_not_from_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = put_into_hub_cache(tmp_path / "hub", "someone/shapes", SHAPES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    origin = HubOrigin(describe_model(config("someone/shapes")), tmp_path / "cache")
    giver = Giver(
        LocalModel(SHAPES, {"unet/config.json": ModelFile((SHAPES / "unet/config.json").stat().st_size, None)})
    )
    place = ModelCache(tmp_path / "cache", 10**12).get(origin, giver)
    assert place.name == commit
    assert not giver.turns
    for weights in place.rglob("*.safetensors"):
        weights.unlink()  # what is left is what the driver has fetched
    assert ModelCache(tmp_path / "cache", 10**12).get(origin, giver) == tmp_path / "cache" / commit
    assert giver.turns == [commit]


@pytest.mark.torch
def test_a_job_names_a_model_in_a_store(tmp_path: Path, moto: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from gaudi_batch.pipelines import loading
    from gaudi_batch.pipelines.cpu import CpuPipeline

    monkeypatch.setattr(loading, "MODELS", ModelCache(tmp_path / "cache", 10**12))
    url = moto.url("models")
    storage = Storage(f"{url}/shapes", moto.options)
    for path in SHAPES.rglob("*"):
        if path.is_file():
            storage.put(str(path.relative_to(SHAPES)), path.read_bytes())
    fields = {"output": moto.url("out"), "storage_options": moto.options}
    model, built_in = describe_model(config(f"{url}/shapes", **fields)), describe_model(config("builtin:shapes"))
    assert (model.family, model.width, model.scheduler) == (built_in.family, built_in.width, built_in.scheduler)
    items = [Item(0, 0, "a red circle", "", 7)]
    made = [CpuPipeline(each, 1, "float32") for each in (model, built_in)]
    first, second = (each.generate(Bucket(64, 64, 2, 4.0), items).images for each in made)
    assert np.array_equal(first, second)
    assert made[0].model == model.revision
    storage.put("unet/config.json", (SHAPES / "unet/config.json").read_bytes() + b" ")
    assert describe_model(config(f"{url}/shapes", **fields)).revision != model.revision
    with pytest.raises(InputError, match="there is nothing in"):
        describe_model(config(f"{url}/absent", **fields))
