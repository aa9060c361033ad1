"""Names of images in an export, from a template and what the manifest says of each image.

A name never leaves its directory and is good on any file system: what could be a path, a hidden file, a device of
Windows or an extension becomes `_`. Two images of one name are an error, also where they differ in case alone.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from gaudi_batch.dataset.arrow import python_rows
from gaudi_batch.errors import InputError
from gaudi_batch.text import did_you_mean, one_line, short_repr

DEFAULT_TEMPLATE = "{row:08d}-{image_index:02d}"
"""As runs name their images."""
MAX_NAME_BYTES = 128
"""Bytes of a name in UTF-8, without what it ends with: half of what file systems take, since some encrypt names."""
_UNSAFE = re.compile(r'[\x00-\x20\x7f-\x9f"#%*./:<>?\\|\u2028\u2029\ufeff]+')
"""What a path, a shell, Windows or a loader of tar files, which ends a name at its first dot, takes for more than a
letter."""
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com\d|lpt\d)", re.IGNORECASE)
_VARIATIONS = re.compile("[\ufe00-\ufe0f\U000e0100-\U000e01ef\u115f\u1160\u17b4\u17b5\u3164\uffa0]")
"""Characters that are not seen, and which some file systems pass over; besides those of the class Cf."""
_WIDE = re.compile(r"\d{3}")


class Template:
    """A template such as `{id}-{image_index}`.

    Args:
        text: with columns of the manifest in braces, and with format specifications, as in `{row:06d}`, if need be.
        columns: those that the manifest has.

    Raises:
        InputError: it is no template, or needs a column that is not there.
    """

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        self.text = text
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise InputError(f"--name {text!r}: {error}") from None
        self.fields = [field for _, field, _, _ in parts if field is not None]
        if not self.fields:
            raise InputError(f"--name {text!r}: names no column; '{{id}}-{{image_index}}' does")
        for field in self.fields:
            if field not in columns:
                raise InputError(
                    f"--name {text!r}: the manifest has no column {field!r}; {did_you_mean(field, columns)}it has"
                    f" {one_line(', '.join(columns), 400)}"
                )
        if any("{" in (spec or "") or conversion for _, _, spec, conversion in parts):
            raise InputError(f"--name {text!r}: a column may have a format such as {{row:06d}} and nothing else")
        if any(_WIDE.search(spec or "") for _, _, spec, _ in parts):
            raise InputError(f"--name {text!r}: a format may ask for 99 characters at most")
        self._parts = parts

    def names(self, rows: pa.Table) -> list[str]:
        """The name of each row, without what it ends with.

        Raises:
            InputError: a value does not fit its format, or two rows get one name.
        """
        names = [self._filled(row) for row in python_rows(rows.select(list(dict.fromkeys(self.fields))))]
        first: dict[str, int] = {}
        for place, name in enumerate(names):
            other = first.setdefault(same_on_any_disk(name), place)
            if other != place:
                image, before = (
                    f"row {rows.column('row')[at]}, image {rows.column('image_index')[at]}" for at in (place, other)
                )
                raise InputError(
                    f"--name {self.text!r}: two images are called {name!r}: {before}, and {image}; with"
                    " {row}-{image_index} in it each has its own name"
                )
        return names

    def _filled(self, row: dict[str, Any]) -> str:
        pieces: list[str] = []
        texts: list[int] = []
        for literal, field, spec, _ in self._parts:
            pieces.append(literal)
            if field is not None:
                value = row[field]
                if isinstance(value, str):
                    texts.append(len(pieces))
                try:
                    pieces.append("none" if value is None else format(value, spec or ""))
                except (ValueError, TypeError, OverflowError):
                    raise InputError(
                        f"--name {self.text!r}: {short_repr(value, 80)} of column {field!r} has no format {spec!r}"
                    ) from None
        pieces = [_safe(piece) for piece in pieces]
        # A text is cut before numbers are, which tell images of one text apart.
        while texts and (excess := len("".join(pieces).encode()) - MAX_NAME_BYTES) > 0:
            longest = max(texts, key=lambda place: len(pieces[place].encode()))
            if not pieces[longest]:
                break
            pieces[longest] = _cut(pieces[longest], len(pieces[longest].encode()) - excess)
        return safe_name("".join(pieces))


def safe_name(text: str) -> str:
    """A text as a name that is good on any file system and in any archive, of at most MAX_NAME_BYTES bytes."""
    name = _cut(_safe(text), MAX_NAME_BYTES).strip("-~_")
    if is_device(name):
        name += "_"
    return name or "image"


def is_device(name: str) -> bool:
    """Whether Windows takes a name for a device, and makes neither a file nor a directory of it."""
    return _DEVICES.fullmatch(unicodedata.normalize("NFKC", name)) is not None


def _safe(text: str) -> str:
    text = unicodedata.normalize("NFC", text).encode("utf-8", "replace").decode()
    text = "".join(letter for letter in _VARIATIONS.sub("", text) if unicodedata.category(letter) != "Cf")
    return _UNSAFE.sub("_", unicodedata.normalize("NFC", text))


def _cut(text: str, size: int) -> str:
    return text.encode()[: max(0, size)].decode("utf-8", "ignore")


def same_on_any_disk(name: str) -> str:
    """What two names have in common that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFKC", name).casefold())
