"""Compiled recipes go to storage beside a card's work, and come from there before it begins."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

from gaudi_batch.pipelines.recipes import Recipes
from gaudi_batch.text import counted

log = logging.getLogger(__name__)

BRING_TIMEOUT_S = 60.0
"""Seconds for which a card that has loaded waits for recipes; what comes later serves its next graphs."""
KEEP_TIMEOUT_S = 10.0
"""Seconds for which the record of a shard waits for recipes that are new: the run may end with that record."""


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
            brought = self._pool.submit(self._recipes.bring).result(BRING_TIMEOUT_S)
        except FutureTimeoutError:
            return (
                f"compiled recipes did not come from storage within {BRING_TIMEOUT_S:.0f} s, so this node compiles"
                " its own until they do"
            )
        except Exception as error:
            return f"compiled recipes can't be had from storage, so this node compiles its own: {error}"
        if brought:
            log.info("%s of other nodes came from storage", counted(brought, "compiled recipe"))
        return None

    def keep(self) -> None:
        """Keeps in storage what this node has compiled, in a thread, and waits for that a while. Raises nothing."""
        recipes = self._recipes
        if recipes is not None and (self._keeping is None or self._keeping.done()):
            self._keeping = self._pool.submit(self._keep, recipes)
            with contextlib.suppress(FutureTimeoutError):
                self._keeping.result(KEEP_TIMEOUT_S)

    def _keep(self, recipes: Recipes) -> None:
        try:
            recipes.keep()
        except Exception as error:
            log.warning("compiled recipes can't be kept in storage, so other nodes compile their own: %s", error)
            self._recipes = None
