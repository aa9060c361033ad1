"""Names in an export can't leave their directory, clash in silence or break on any file system."""

from __future__ import annotations

import unicodedata
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.errors import InputError
from gaudi_batch.export.names import DEFAULT_TEMPLATE, MAX_NAME_BYTES, Template, safe_name

WINDOWS = set('<>:"/\\|?*') | {chr(code) for code in range(32)}


def rows(ids: list[Any], **columns: list[Any]) -> pa.Table:
    """Rows of a manifest with these ids."""
    numbers = pa.array(range(len(ids)), pa.int64())
    return pa.table({"id": ids, "row": numbers, "image_index": pa.array([0] * len(ids), pa.int32()), **columns})


def named(template: str, table: pa.Table) -> list[str]:
    return Template(template, table.column_names).names(table)


@given(st.text())
def test_a_name_is_good_on_any_file_system(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(name.encode()) <= MAX_NAME_BYTES
    assert not WINDOWS & set(name)
    assert not name.startswith((".", "-", "_", "~"))
    assert not name.endswith((".", " "))
    assert "." not in name, "a loader of tar files ends a name at its first dot"
    assert name == unicodedata.normalize("NFC", name)
    assert name.upper() not in {
        "CON",
        "PRN",
        "AUX",
        "NUL",
        *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10)),
    }
    assert safe_name(name) == name


@given(st.lists(st.text(max_size=12), min_size=1, unique=True))
def test_names_of_ids_are_one_for_each_or_refused(ids: list[str]) -> None:
    table = rows(ids)
    try:
        names = named("{id}-{image_index}", table)
    except InputError:
        names = named("{row}-{id}", table)
    folded = {unicodedata.normalize("NFKC", name).casefold() for name in names}
    assert len(folded) == len(names)


def test_a_long_text_is_cut_and_not_the_numbers_after_it() -> None:
    table = rows(["x" * 300, "x" * 300], prompt=["y" * 400, "é" * 400])
    names = named("{prompt}-{id}-{row}-{image_index}", table)
    assert [name[-4:] for name in names] == ["-0-0", "-1-0"]
    assert all(MAX_NAME_BYTES - 3 <= len(name.encode()) <= MAX_NAME_BYTES for name in names)


CLASHES = [
    ["a/b", "a_b"],
    ["A", "a"],
    ["e\u0301", "\u00e9"],
    ["x.", "x"],
    ["\u00df", "SS"],
    ["a\u200db", "ab"],
    ["x\ufe0f", "x"],
]
"""Ids of one name, on some file system or after what is unsafe is replaced."""


@pytest.mark.parametrize("pair", CLASHES)
def test_a_clash_is_refused_and_names_both(pair: list[str]) -> None:
    with pytest.raises(InputError, match=r"two images are called .*row 0, image 0, and row 1, image 0; with \{row\}"):
        named("{id}", rows(pair))


def test_a_template_has_columns_and_formats() -> None:
    table = rows(["x", "y"], width=[64, 128], score=[0.25, 0.5])
    assert named(DEFAULT_TEMPLATE, table) == ["00000000-00", "00000001-00"]
    assert named("{id}-{image_index:03d}_{width}", table) == ["x-000_64", "y-000_128"]
    assert named("../../{id}/{score:.1f}", table) == ["x_0_2", "y_0_5"]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{nope}", "the manifest has no column 'nope'; "),
        ("{idd}", "did you mean 'id'?"),
        ("fixed", "names no column"),
        ("{id", "expected '}'"),
        ("{}", "has no column ''"),
        ("{id.__class__}", "has no column 'id.__class__'"),
        ("{id[0]}", "has no column 'id[0]'"),
        ("{id!r}", "a column may have a format"),
        ("{row:{id}}", "a column may have a format"),
        ("{row:999999999}", "a format may ask for 99 characters at most"),
        ("{id:06d}", "'x' of column 'id' has no format '06d'"),
    ],
)
def test_a_template_that_can_t_be_is_refused_by_name(template: str, told: str) -> None:
    with pytest.raises(InputError) as refused:
        named(template, rows(["x"]))
    assert told in str(refused.value)
