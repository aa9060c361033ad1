"""Prompts in other formats: the line of Python that makes Parquet of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

READERS = {
    "csv": "pandas.read_csv({name!r})",
    "tsv": "pandas.read_csv({name!r}, sep='\\t')",
    "jsonl": "pandas.read_json({name!r}, lines=True)",
    "ndjson": "pandas.read_json({name!r}, lines=True)",
    "json": "pandas.read_json({name!r})",
    "txt": "pandas.DataFrame({{'prompt': open({name!r}, encoding='utf-8').read().splitlines()}})",
}
"""The reader for each suffix. All but the last take compressed files, too."""
_SUFFIX = re.compile(r"\.(csv|tsv|jsonl|ndjson|json|txt)(\.(gz|bz2|xz|zst|zip))?$", re.IGNORECASE)


def how_to_convert(names: Iterable[str]) -> str | None:
    """How to convert the first of some files that is a table in a known format, as a part of a sentence; None if none
    is."""
    for path in sorted(names):
        name = path.rpartition("/")[2]
        match = _SUFFIX.search(name)
        if match and not (match[2] and match[1].lower() == "txt"):
            parquet = name[: match.start()] + ".parquet"
            reader = READERS[match[1].lower()].format(name=name)
            return f"a job reads Parquet alone; in Python: import pandas; {reader}.to_parquet({parquet!r})"
    return None
