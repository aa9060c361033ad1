"""Compiled recipes that storage keeps: whole ones alone, each once, and a node that comes later compiles nothing."""

from __future__ import annotations

import fcntl
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gaudi_batch import InputError, JobConfig
from gaudi_batch.card import recipe_keeper
from gaudi_batch.card.recipe_keeper import RecipeKeeper
from gaudi_batch.layout import is_of_run
from gaudi_batch.pipelines.recipes import Recipes, place_of
from gaudi_batch.storage.store import Storage


@pytest.fixture
def store(tmp_path: Path) -> Storage:
    (tmp_path / "store").mkdir()
    return Storage(str(tmp_path / "store"), retry_timeout_s=0.0)


def node(home: Path, store: Storage, max_bytes: int = 10**9) -> Recipes:
    return Recipes(home, store, "recipes/card", max_bytes)


def compiled(home: Path, name: str, recipe: str = "recipe", metadata: str = "metadata") -> None:
    """As Intel's bridge writes them."""
    home.mkdir(exist_ok=True)
    (home / f"{name}.recipe").write_text(f"{recipe} {name}")
    (home / f"{name}.metadata").write_text(metadata)


def content(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()} if directory.exists() else {}


def test_what_one_node_has_compiled_another_has(store: Storage, tmp_path: Path) -> None:
    first, second = node(tmp_path / "a", store), node(tmp_path / "b", store)
    assert first.bring() == 0
    assert first.keep() == 0
    compiled(tmp_path / "a", "17_4711_syn1.24.0.0a1b2c3")  # as the bridge names them
    compiled(tmp_path / "a", "18")
    assert first.keep() == 2
    assert first.keep() == 0
    assert content(tmp_path / "store/recipes/card") == content(tmp_path / "a")
    assert second.bring() == 2
    assert content(tmp_path / "b") == content(tmp_path / "a")
    compiled(tmp_path / "b", "19")
    assert second.keep() == 1
    assert first.bring() == 1
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_a_recipe_that_is_being_written_is_not_kept(store: Storage, tmp_path: Path) -> None:
    first = node(tmp_path / "a", store)
    compiled(tmp_path / "a", "17", metadata="")
    (tmp_path / "a/18.metadata").write_text("of a recipe that is not there")
    (tmp_path / "a/eviction.lock").write_text("")
    assert first.keep() == 0
    (tmp_path / "a/17.metadata").write_text("now it is whole")
    assert first.keep() == 1
    assert sorted(content(tmp_path / "store/recipes/card")) == ["17.metadata", "17.recipe"]


def test_half_a_recipe_in_storage_is_not_brought_and_what_a_node_has_is_not_replaced(
    store: Storage, tmp_path: Path
) -> None:
    compiled(tmp_path / "b", "18", "its own")
    store.put("recipes/card/17.recipe", b"without metadata")
    for name in ("18.recipe", "18.metadata"):
        store.put(f"recipes/card/{name}", b"another's")
    assert node(tmp_path / "b", store).bring() == 0
    assert content(tmp_path / "b") == {"18.recipe": "its own 18", "18.metadata": "metadata"}


def test_what_a_killed_process_has_left_of_a_recipe_is_replaced(store: Storage, tmp_path: Path) -> None:
    compiled(tmp_path / "a", "17")
    assert node(tmp_path / "a", store).keep() == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b/17.recipe").write_text("rec")
    (tmp_path / "b/17.metadata").write_text("")  # the bridge opens it before it compiles
    assert node(tmp_path / "b", store).bring() == 1
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_a_recipe_whose_lock_the_bridge_has_is_kept_later(store: Storage, tmp_path: Path) -> None:
    compiled(tmp_path / "a", "17")
    first = node(tmp_path / "a", store)
    with (tmp_path / "a/17.metadata").open() as metadata:
        fcntl.flock(metadata, fcntl.LOCK_EX)
        assert first.keep() == 0
    assert first.keep() == 1


def test_a_graph_that_the_bridge_compiles_now_is_left_to_it(store: Storage, tmp_path: Path) -> None:
    compiled(tmp_path / "a", "17")
    node(tmp_path / "a", store).keep()
    (tmp_path / "b").mkdir()
    with (tmp_path / "b/17.metadata").open("w") as metadata:
        fcntl.flock(metadata, fcntl.LOCK_EX)
        assert node(tmp_path / "b", store).bring() == 0
    assert content(tmp_path / "b") == {"17.metadata": ""}
    assert node(tmp_path / "b", store).bring() == 1


def test_releases_that_append_the_rank_find_their_recipes(store: Storage, tmp_path: Path) -> None:
    compiled(tmp_path / "a0", "17")
    assert node(tmp_path / "a", store).keep() == 1
    (tmp_path / "b0").mkdir()
    assert node(tmp_path / "b", store).bring() == 1
    assert content(tmp_path / "b0") == content(tmp_path / "b") == content(tmp_path / "a0")


def test_no_more_is_brought_than_the_cache_may_hold(store: Storage, tmp_path: Path) -> None:
    compiled(tmp_path / "a", "17", recipe="one that is too large")
    for name in ("18", "19", "20"):
        compiled(tmp_path / "a", name)
    node(tmp_path / "a", store).keep()
    assert node(tmp_path / "b", store, max_bytes=2 * len("recipe 18")).bring() == 2
    assert sorted(content(tmp_path / "b")) == ["18.metadata", "18.recipe", "19.metadata", "19.recipe"]


def test_what_the_node_has_counts_when_more_is_brought(store: Storage, tmp_path: Path) -> None:
    """Else the bridge would remove its oldest, the node's own."""
    for name in ("18", "19"):
        compiled(tmp_path / "a", name)
    node(tmp_path / "a", store).keep()
    compiled(tmp_path / "b", "17")
    assert node(tmp_path / "b", store, max_bytes=2 * len("recipe 18")).bring() == 1


def test_an_output_gets_no_recipes_of_earlier_jobs(store: Storage, tmp_path: Path) -> None:
    compiled(tmp_path / "a", "17")
    recipes = Recipes(tmp_path / "a", store, "recipes/card", 10**9, keeps_all=False)
    assert not recipes.has_new()
    compiled(tmp_path / "a", "18")
    assert recipes.has_new()
    assert recipes.keep() == 1
    assert sorted(content(tmp_path / "store/recipes/card")) == ["18.metadata", "18.recipe"]


def test_one_card_of_a_node_brings_and_keeps_for_all(
    store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("17", "18", "19"):
        compiled(tmp_path / "a", name)
    node(tmp_path / "a", store).keep()
    asked: list[str] = []
    get = Storage.get

    def noted(self: Storage, path: str) -> bytes | None:
        asked.append(path)
        return get(self, path)

    monkeypatch.setattr(Storage, "get", noted)
    with ThreadPoolExecutor(8) as pool:
        brought = list(pool.map(lambda _: node(tmp_path / "b", store).bring(), range(8)))
    assert sorted(brought) == [0] * 7 + [3]
    assert len(asked) == 6
    compiled(tmp_path / "b", "20")
    with (tmp_path / "b.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert node(tmp_path / "b", store).keep() == 0
    assert node(tmp_path / "b", store).keep() == 1


def test_a_store_that_fails_costs_no_card(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    compiled(tmp_path / "a", "17")
    keeper = RecipeKeeper(node(tmp_path / "a", Storage(str(tmp_path / "file"), retry_timeout_s=0.0)))
    assert "this node compiles its own" in str(keeper.bring())
    keeper.keep()
    assert "compiled recipes can't be kept" in caplog.text
    assert RecipeKeeper(None).bring() is None


def test_a_store_that_is_slow_holds_no_card_up(store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_keeper, "BRING_TIMEOUT_S", 0.01)
    monkeypatch.setattr(recipe_keeper, "KEEP_TIMEOUT_S", 0.01)
    answers, entries = threading.Event(), Storage.entries
    monkeypatch.setattr(Storage, "entries", lambda self, path: answers.wait(60) and entries(self, path))
    compiled(tmp_path / "a", "17")
    keeper = RecipeKeeper(node(tmp_path / "a", store))
    assert "did not come from storage within" in str(keeper.bring())
    keeper.keep()
    assert not content(tmp_path / "store/recipes/card")
    answers.set()
    monkeypatch.setattr(recipe_keeper, "KEEP_TIMEOUT_S", 60.0)
    compiled(tmp_path / "a", "18")
    for _ in range(1000):
        keeper.keep()
        if len(store.names("recipes/card")) == 4:
            return
    pytest.fail("they are not kept")


def test_prompts_beside_recipes_are_prompts() -> None:
    assert is_of_run("recipes/hpu-GAUDI2-1.24.0/17.recipe")
    assert not is_of_run("recipes/part.parquet")


def test_recipes_of_other_cards_and_releases_lie_elsewhere() -> None:
    stack = {"device": "hpu GAUDI2", "habana-torch-plugin": "1.24.0.615", "torch": "2.10.0"}
    assert place_of(stack) == "hpu-GAUDI2-1.24.0.615"
    assert place_of(stack | {"device": "hpu GAUDI3"}) != place_of(stack)
    assert place_of(stack | {"habana-torch-plugin": "1.25.0.1"}) != place_of(stack)


@pytest.mark.parametrize("place", ["recipes", "../up", ""])
def test_a_place_for_recipes_is_absolute(place: str) -> None:
    with pytest.raises(InputError, match=r"gaudi\.recipe_store: .*: must be output, a URL, an absolute path or null"):
        JobConfig(prompts="p", output="o", model="builtin:shapes", gaudi={"recipe_store": place})
