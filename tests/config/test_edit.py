"""A field of a job file is changed and nothing else: comments, layout and line ends stay."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gaudi_batch.config.edit import with_field
from gaudi_batch.text import load_yaml


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: 1\nbatch_size: 4\nb: 2\n", "a: 1\nbatch_size: 16\nb: 2\n"),
        ("batch_size:   4   # a guess\n", "batch_size:   16   # a guess\n"),
        ("a: 1  # first\n\n# last\nbatch_size: 4", "a: 1  # first\n\n# last\nbatch_size: 16"),
        ("a: 1\r\nbatch_size: 4\r\nb: 2\r\n", "a: 1\r\nbatch_size: 16\r\nb: 2\r\n"),
        ("a: 1\n", "a: 1\nbatch_size: 16\n"),
        ("a: 1", "a: 1\nbatch_size: 16\n"),
        ("a: 1\r\nb: 2", "a: 1\r\nb: 2\r\nbatch_size: 16\r\n"),
        ("a: 1\n# batch_size: 4\n", "a: 1\n# batch_size: 4\nbatch_size: 16\n"),
        ("a: 1 # batch_size: 4", "a: 1 # batch_size: 4\nbatch_size: 16\n"),
        ("a: 'batch_size: 4'\n", "a: 'batch_size: 4'\nbatch_size: 16\n"),
        ("a: {batch_size: 4}\n", "a: {batch_size: 4}\nbatch_size: 16\n"),
        ("a:\n  batch_size: 4\n", "a:\n  batch_size: 4\nbatch_size: 16\n"),
        ("batch_size:\na: 1\n", "batch_size: 16\na: 1\n"),
        ("batch_size: null\n", "batch_size: 16\n"),
        ('"batch_size": "4"\n', '"batch_size": 16\n'),
        ("batch_size : 4\n", "batch_size : 16\n"),
        ("batch_size: 4\nbatch_size: 8\n", "batch_size: 4\nbatch_size: 16\n"),
        ("---\na: 1\n", "---\na: 1\nbatch_size: 16\n"),
        ("  a: 1\n  b: 2\n", "  a: 1\n  b: 2\n  batch_size: 16\n"),
        ("\ufeffbatch_size: 4\n", "\ufeffbatch_size: 16\n"),
        ("é: '日本'  # ü\nbatch_size: 4\n", "é: '日本'  # ü\nbatch_size: 16\n"),
        # What a line at the end would be a part of: it goes to the beginning.
        ("# head\na: |\n  text", "# head\nbatch_size: 16\na: |\n  text"),
        ("a: 1\n...\n", "batch_size: 16\na: 1\n...\n"),
        # JSON is YAML.
        ('{"a": 1, "batch_size": 4}', '{"a": 1, "batch_size": 16}'),
        ('{"a": 1}', '{"batch_size": 16, "a": 1}'),
        ("{a: 1,\n b: 2}  # b\n", '{"batch_size": 16, a: 1,\n b: 2}  # b\n'),
        ("{}", '{"batch_size": 16}'),
        # The value is right already.
        ("batch_size: 0x10\n", "batch_size: 0x10\n"),
    ],
)
def test_one_line_is_changed_or_added(before: str, after: str) -> None:
    assert with_field(before, "batch_size", 16) == after


@pytest.mark.parametrize(
    "text",
    [
        "batch_size: &b 4\nsteps: *b\n",  # other fields would change with it, or lose their anchor
        "",
        "- batch_size: 4\n",
        "just a text",
    ],
)
def test_what_can_t_be_changed_alone_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"batch_size has no line of its own|no mapping"):
        with_field(text, "batch_size", 16)


plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(plain, values, min_size=1, max_size=5),
    st.just({}) | st.fixed_dictionaries({"batch_size": st.none() | st.integers() | plain}),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 512),
)
def test_whatever_a_job_file_holds_the_rest_means_the_same(
    others: dict[str, object], own: dict[str, object], flow: bool, newline: str, ended: bool, batch_size: int
) -> None:
    fields = {**own, **others} if ended else {**others, **own}
    text = json.dumps(fields) if flow else yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    text = text.rstrip("\n").replace("\n", newline) + (newline if ended else "")
    before = load_yaml(text)
    after = load_yaml(with_field(text, "batch_size", batch_size))
    assert after == {**before, "batch_size": batch_size}
