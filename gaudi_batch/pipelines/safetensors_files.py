"""What a safetensors file has, from its header alone: https://huggingface.co/docs/safetensors (format)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

MAX_HEADER = 100_000_000
"""Bytes of a header; safetensors itself reads no longer ones."""
_LENGTH = 8
"""Bytes at the beginning that say how long the header is."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def read_shapes(read: Callable[[int, int], bytes]) -> Shapes:
    """The shapes of a file's tensors.

    Args:
        read: returns the bytes from one place of the file to another.

    Raises:
        ValueError: it is no safetensors file.
    """
    size = int.from_bytes(read(0, _LENGTH), "little")
    if not 2 <= size <= MAX_HEADER:
        raise ValueError("it is no safetensors file")
    try:
        header = json.loads(read(_LENGTH, _LENGTH + size))
        return {name: tuple(map(int, value["shape"])) for name, value in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("it is no safetensors file") from None
