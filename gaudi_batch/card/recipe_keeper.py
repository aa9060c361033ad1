"""Compiled recipes go to storage beside a card's work, and come from there before it begins."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

from gaudi_batch.errors import StorageError
from gaudi_batch.pipelines.recipes import Recipes
from gaudi_batch.text import counted

log = logging.getLogger(__name__)


class RecipeKeeper:
    """Brings the recipes of other nodes to this one, and keeps its own for them. A store that fails costs the time of
    compiling and no image.

    Args:
        recipes: of this node; None where none are kept in storage.
    """

    def __init__(self, recipes: Recipes | None) -> None:
        self._recipes = recipes
        self._pool = ThreadPoolExecutor(1, "recipes")
        self._keeping: Future[None] | None = None

    def bring(self) -> str | None:
        """Fetches the recipes that other nodes have compiled; returns what a person should know, if that failed."""
        if self._recipes is None:
            return None
        try:
            brought = self._recipes.bring()
        except (StorageError, OSError) as error:
            return f"compiled recipes can't be had from storage, so this node compiles its own: {error}"
        if brought:
            log.info("%s of other nodes came from storage", counted(brought, "compiled recipe"))
        return None

    def keep(self) -> None:
        """Keeps in storage what this node has compiled, in a thread, unless that is being done."""
        if self._recipes is not None and (self._keeping is None or self._keeping.done()):
            self._keeping = self._pool.submit(self._keep)

    def close(self) -> None:
        """Waits until what is being kept is kept."""
        self._pool.shutdown()

    def _keep(self) -> None:
        assert self._recipes is not None
        try:
            self._recipes.keep()
        except (StorageError, OSError) as error:
            log.warning("compiled recipes can't be kept in storage, so other nodes compile their own: %s", error)
            self._recipes = None
