"""Models in stores: fetched once a node, there as a whole or not at all, and within the space that they may take."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import StoreServer, put_into_hub_cache

from gaudi_batch import InputError, JobConfig
from gaudi_batch.errors import StorageError
from gaudi_batch.pipelines import origins
from gaudi_batch.pipelines.base import Item
from gaudi_batch.pipelines.families import FAMILIES
from gaudi_batch.pipelines.fetching import NO_PEERS, Files, LocalModel, ModelFile, Origin, PeerLost
from gaudi_batch.pipelines.model_cache import LISTING, ModelCache
from gaudi_batch.pipelines.model_files import entries_of_model
from gaudi_batch.pipelines.origins import HubOrigin, StoreOrigin
from gaudi_batch.pipelines.sources import BUILTIN_MODELS, ModelInfo, describe_model
from gaudi_batch.plan import Bucket
from gaudi_batch.storage.listing import Entry
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


def loaded(directory: Path) -> dict[str, bytes]:
    """What is there beside the list of files."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != LISTING)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_cards_of_a_node_fetch_a_model_once(store: Storage, tmp_path: Path, fetched: Counter[str]) -> None:
    files = entries_of_model(store, True)
    caches = [ModelCache(tmp_path / "cache", 10**12) for _ in range(8)]
    with ThreadPoolExecutor(len(caches)) as pool:
        places = set(pool.map(lambda cache: cache.get(StoreOrigin("revision", store, files), NO_PEERS), caches))
    assert len(places) == 1
    assert fetched == Counter(files.keys())
    assert loaded(places.pop()) == {path: (Path(store.root) / path).read_bytes() for path in files}


def test_what_a_killed_process_has_left_is_completed(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    files, rename, killed = entries_of_model(store, True), Path.rename, ModelCache(tmp_path / "cache", 10**12)
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
    assert loaded(place) == {path: (Path(store.root) / path).read_bytes() for path in files}


def test_a_killed_process_that_made_room_leaves_no_half_for_a_whole(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = entries_of_model(store, True)
    old = ModelCache(tmp_path / "cache", 10**12)
    old.get(StoreOrigin("old", store, files), NO_PEERS)
    old.release()

    def is_killed(directory: Path, **_: Any) -> None:
        (directory / "model_index.json").unlink()
        raise KeyboardInterrupt

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", is_killed)
    with pytest.raises(KeyboardInterrupt):
        ModelCache(tmp_path / "cache", 1).get(StoreOrigin("new", store, files), NO_PEERS)
    monkeypatch.setattr(shutil, "rmtree", remove)
    place = ModelCache(tmp_path / "cache", 10**12).get(StoreOrigin("old", store, files), NO_PEERS)
    assert loaded(place).keys() == files.keys()
    assert not list((tmp_path / "cache").glob("..*"))


def test_what_is_no_model_is_not_removed_to_make_room(store: Storage, tmp_path: Path) -> None:
    files = entries_of_model(store, True)
    (tmp_path / "cache/..data").mkdir(parents=True)
    (tmp_path / "cache/hub").mkdir()
    (tmp_path / "cache/hub/users").write_text("")
    ModelCache(tmp_path / "cache", 1).get(StoreOrigin("new", store, files), NO_PEERS)
    assert (tmp_path / "cache/hub/users").exists()
    assert (tmp_path / "cache/..data").exists()


def test_a_model_that_can_not_fit_costs_no_other(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = entries_of_model(store, True)
    old = ModelCache(tmp_path / "cache", 10**12)
    old.get(StoreOrigin("old", store, files), NO_PEERS)
    old.release()
    files["unet/config.json"] = Entry(10**9, "")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match="does not fit into"):
        ModelCache(tmp_path / "cache", 10**12).get(StoreOrigin("new", store, files), NO_PEERS)
    assert (tmp_path / "cache/old/model_index.json").exists()


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    files = entries_of_model(store, True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"does not fit into .* GB are free; name another .* GAUDI_BATCH_MODELS"):
        ModelCache(tmp_path / "cache", 10**12).get(StoreOrigin("revision", store, files), NO_PEERS)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"can't be kept in .*; name another .* GAUDI_BATCH_MODELS"):
        ModelCache(tmp_path / "file/cache", 10**12).get(StoreOrigin("revision", store, files), NO_PEERS)
    assert not fetched


def test_a_mark_that_only_looks_like_an_md5_is_no_fault(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    """As the ETag of an object that is encrypted by a key of the user's."""
    files = entries_of_model(store, True)
    files["unet/config.json"] = Entry(files["unet/config.json"].size, f"ETag {'0' * 32}")
    monkeypatch.setattr(Storage, "entry", lambda self, path: files[path])
    place = ModelCache(tmp_path / "cache", 10**12).get(StoreOrigin("revision", store, files), NO_PEERS)
    assert loaded(place).keys() == files.keys()
    assert fetched["unet/config.json"] == 2


def test_what_diffusers_does_not_load_is_not_fetched(store: Storage) -> None:
    files, root = entries_of_model(store, True), Path(store.root)
    (root / "LICENSE").write_text("")
    (root / "sd_xl_base_1.0.safetensors").write_text("")
    for name in ("diffusion_pytorch_model.fp16.safetensors", "openvino_model.bin", "flax_model.msgpack"):
        (root / "unet" / name).write_text("")
    (root / "unet/diffusion_pytorch_model.bin").write_text("")
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*shards, "diffusion_pytorch_model.safetensors.index.json"):
        (root / "vae" / name).write_text("")
    (root / "tokenizer/chat_template.jinja").write_text("")
    more = {*(f"vae/{name}" for name in shards), "vae/diffusion_pytorch_model.safetensors.index.json"}
    assert entries_of_model(store, True).keys() - files.keys() == more | {"tokenizer/chat_template.jinja"}
    assert "unet/diffusion_pytorch_model.bin" in entries_of_model(store, False)


@pytest.mark.parametrize("content", [b"{}", b"same size"], ids=["another size", "the same size"])
def test_a_model_that_changes_meanwhile_is_not_taken(store: Storage, tmp_path: Path, content: bytes) -> None:
    files = entries_of_model(store, True)
    changed = Path(store.root) / "unet/config.json"
    changed.write_bytes(content if content == b"{}" else changed.read_bytes().replace(b"1", b"2"))
    with pytest.raises(StorageError, match=r"unet/config\.json"):
        ModelCache(tmp_path / "cache", 10**12).get(StoreOrigin("revision", store, files), NO_PEERS)
    assert not (tmp_path / "cache/revision").exists()


def test_models_that_nobody_uses_make_room_the_least_recently_used_first(store: Storage, tmp_path: Path) -> None:
    files, root = entries_of_model(store, True), tmp_path / "cache"
    size = sum(entry.size for entry in files.values()) + 10_000  # with the list of its files
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
    origin = StoreOrigin("revision", store, entries_of_model(store, True))
    giver = Giver(LocalModel(Path(store.root), origin.files()), dict(fails))
    place = ModelCache(tmp_path / "cache", 10**12).get(origin, giver)
    assert loaded(place) == {path: (Path(store.root) / path).read_bytes() for path in origin.files()}
    assert not fetched
    assert len(giver.turns) == 1 + len(fails)
    assert set(giver.offered) == {"revision"}
    assert giver.offered_in_turn, "who waits would ask the origin"
    again = ModelCache(tmp_path / "cache", 10**12).get(origin, giver)
    assert again == place
    assert len(giver.offered) == 3
    assert len(giver.turns) == 1 + len(fails)


def test_a_note_of_a_model_that_the_hubs_cache_has_no_more_counts_for_nothing(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "snapshot")
    files = {"model_index.json": ((SHAPES / "model_index.json").stat().st_size, None)}
    files["unet/config.json"] = ((SHAPES / "unet/config.json").stat().st_size, None)
    (tmp_path / "commit.hub").write_text(json.dumps({"directory": str(tmp_path / "snapshot"), "files": files}))
    origin = HubOrigin(ModelInfo("a/b", "a/b", True, "commit", FAMILIES[0], None, 64, 64), tmp_path)
    assert origin.present() is not None
    (tmp_path / "snapshot/unet/config.json").unlink()
    assert origin.present() is None
    (tmp_path / "commit.hub").write_text("")
    assert origin.present() is None


def test_a_snapshot_of_the_hub_is_whole_if_it_has_what_is_loaded(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    shutil.copytree(SHAPES, snapshot)
    names = [path.relative_to(SHAPES).as_posix() for path in SHAPES.rglob("*") if path.is_file()]
    names += ["unet/diffusion_pytorch_model.fp16.safetensors", "README.md", "scheduler/flax.msgpack"]
    assert origins._has_all(snapshot, names)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (snapshot / "text_encoder/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    assert origins._has_all(snapshot, names), "of weights of another kind"
    for gone in ("unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"):
        kept = (snapshot / gone).rename(tmp_path / "kept")
        assert not origins._has_all(snapshot, names), gone
        kept.rename(snapshot / gone)
    weights = snapshot / "unet/diffusion_pytorch_model.safetensors"
    variant = weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert not origins._has_all(snapshot, names), "weights of a variant are not loaded"
    variant.rename(weights)
    (snapshot / "text_encoder/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (snapshot / "text_encoder" / shards["a"]).write_text("")
    assert not origins._has_all(snapshot, names), "a shard is not there"
    (snapshot / "text_encoder" / shards["b"]).write_text("")
    assert origins._has_all(snapshot, names)


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
    assert not giver.offered, "nobody knows whether it is whole"
    for weights in place.rglob("*.safetensors"):
        weights.unlink()  # what is left is what the driver has fetched
    assert ModelCache(tmp_path / "cache", 10**12).get(origin, giver) == tmp_path / "cache" / commit
    assert giver.turns == [commit]


@pytest.mark.torch
def test_a_hub_that_gives_a_node_nothing_is_told_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error: access to model a/b is restricted")  # as the hub's errors are

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    origin = HubOrigin(ModelInfo("a/b", "a/b", True, "c" * 40, FAMILIES[0], None, 64, 64), tmp_path / "cache")
    with pytest.raises(StorageError, match=r"the hub gives it not to node .*: .*restricted.* set HF_TOKEN") as error:
        ModelCache(tmp_path / "cache", 10**12).get(origin, NO_PEERS)
    assert "written" not in str(error.value)


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
