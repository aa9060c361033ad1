"""How the stand-in says what it does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def absent(name: str) -> Callable[..., NoReturn]:
    """A function that says that it is not emulated, by its full name."""

    def call(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not emulated")

    call.__name__ = name.rpartition(".")[2]
    return call


def absent_class(name: str) -> type:
    """A class that can be imported and named, and says that it is not emulated when it is used."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name} is not emulated")

    return type(name.rpartition(".")[2], (), {"__init__": refuse, "apply": staticmethod(refuse)})
