"""Finds a job's prompts: files, footers and the columns that the job knows. No row is read."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gaudi_batch.config.schema import PROMPT_COLUMNS, JobConfig
from gaudi_batch.dataset.arrow import is_text
from gaudi_batch.dataset.columns import can_cast, is_binary, plain
from gaudi_batch.dataset.links import LinkedFileSystem, is_hidden
from gaudi_batch.dataset.prompt_file import PromptFile, identity_of, parse_footer, read_footer
from gaudi_batch.dataset.reader import PromptDataset
from gaudi_batch.dataset.tables import how_to_convert
from gaudi_batch.errors import InputError, StorageError
from gaudi_batch.layout import (
    DATA,
    IMAGES,
    JOINED,
    METADATA,
    OWN_FILES,
    ROLLUPS,
    is_of_run,
    own_names,
    parse_attempt,
    parse_manifest,
)
from gaudi_batch.storage.retrying import MANY_TIMEOUT_S
from gaudi_batch.storage.store import Storage
from gaudi_batch.storage.waits import out_of_reach, told_if_slow
from gaudi_batch.text import one_line

log = logging.getLogger(__name__)


FOOTER_THREADS = 16
_PARQUET = re.compile(r"\.(parquet|parq|pq)(?=[./]|$)", re.IGNORECASE)
"""In the path of a file that was probably meant as prompts, such as `x.parquet/part-0` or `y.parquet.gz`."""
_PARQUET_SUFFIX = re.compile(rf"{_PARQUET.pattern}$", re.IGNORECASE)
DIRECTORY_RULE = "a directory's prompts are *.parquet, nothing in it beginning with . or _; a glob takes any name"
FOOTER_BYTES = 1 << 22
"""Bytes of footers that each card gets with the job and need not read; one of an ordinary file has about a thousand."""
MAX_ROWS = 2**31 - 1
"""Most rows of a job. A footer can claim any number, and the plan grows with it."""
EVERY_COLUMN = "*"
"""In a job's `carry`: every column of the prompts."""
NESTED_BYTES = 256
"""Mean bytes of a nested value, before compression, up to which its column is carried."""
_GLOB = re.compile(r"[*?\[{]")


def open_prompts(config: JobConfig) -> PromptDataset:
    """Finds a job's prompt files and checks their columns; reads only footers.

    Raises:
        InputError: no file, no rows, a file that is not Parquet, a missing or mistyped column, files that disagree.
        StorageError: the store failed for longer than `storage_patience`.
    """
    storage, located = _find_files(config)
    slow = told_if_slow(lambda: f"prompts {storage.url}: still reading {len(located)} footers{storage.last_error}")
    with slow, ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda name: _footer(storage, name, config.columns), sorted(located)))
    files: list[PromptFile] = []
    first_row = 0
    footer_bytes = 0
    for name, (metadata, _, footer, identity) in zip(sorted(located), footers, strict=True):
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        sent = footer if footer_bytes + len(footer) <= FOOTER_BYTES else b""
        footer_bytes += len(sent)
        files.append(PromptFile(name, metadata.num_rows, first_row, identity, groups, sent))
        first_row += metadata.num_rows
    if first_row == 0:
        raise InputError(f"prompts {storage.url!r}: the files hold no rows")
    if first_row > MAX_ROWS:
        raise InputError(f"prompts {storage.url!r}: the files hold {first_row} rows; a job takes at most {MAX_ROWS}")
    try:
        # A file without rows, such as an empty data frame's, often has no meaningful types.
        schemas = [plain(schema) for metadata, schema, *_ in footers if metadata.num_rows]
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"prompts {storage.url!r}: the files' columns disagree: {one_line(error, 300)}") from None
    for file, (_, file_schema, *_) in zip(files, footers, strict=True):
        for field in file_schema if file.rows else ():
            shared = schema.field(field.name).type
            if not can_cast(field.type, shared):
                raise InputError(
                    f"prompts file {file.name!r}: column {field.name!r} is {one_line(field.type, 100)}, which can't"
                    f" become {one_line(shared, 100)}, in which the manifest has that of all files; give it that type"
                )
    columns = _map_columns(config, schema, [file_schema for _, file_schema, *_ in footers], files)
    others = pa.schema([field for field in schema if field.name not in columns.values()])
    if config.carry is None:
        carried = _small_columns(storage.url, others, [metadata for metadata, *_ in footers])
    else:
        carried = _named_columns(config.carry, schema, others)
    return PromptDataset(storage, files, columns, carried, len(carried) == len(others))


def _named_columns(carry: Collection[str], schema: pa.Schema, others: pa.Schema) -> pa.Schema:
    """The columns that a job names, of those that it does not know itself."""
    if unknown := set(carry) - {EVERY_COLUMN, *schema.names}:
        raise InputError(f"carry: the prompts have no column {min(unknown)!r}; they have {_named(schema)}")
    return pa.schema([field for field in others if EVERY_COLUMN in carry or field.name in carry])


def _small_columns(url: str, others: pa.Schema, footers: Collection[pq.FileMetaData]) -> pa.Schema:
    """The columns that are carried where the job names none; the log names the others."""
    nested = {field.name for field in others if pa.types.is_nested(field.type)}
    sizes = Counter[str]()
    for metadata in footers if nested else ():
        leaves = [metadata.schema.column(index).path.split(".")[0] for index in range(metadata.num_columns)]
        for index, name in enumerate(leaves):
            if name in nested:
                groups = map(metadata.row_group, range(metadata.num_row_groups))
                sizes[name] += sum(group.column(index).total_uncompressed_size for group in groups)
    most = NESTED_BYTES * sum(metadata.num_rows for metadata in footers)
    left_out = {field.name for field in others if is_binary(field.type) or sizes[field.name] > most}
    if left_out:
        names = ", ".join(repr(name) for name in others.names if name in left_out)
        log.info(
            "prompts %s: the manifests do not carry %s, as binary or as nested and over %d bytes a row (see carry)",
            url,
            one_line(names, 400),
            NESTED_BYTES,
        )
    return pa.schema([field for field in others if field.name not in left_out])


def _map_columns(
    config: JobConfig, schema: pa.Schema, schemas: list[pa.Schema], files: list[PromptFile]
) -> dict[str, str]:
    columns = {}
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise InputError(f"prompts: column {name!r} occurs more than once; rename one")
    for name in PROMPT_COLUMNS:
        column = config.columns.get(name, name)
        if column in schema.names:
            columns[name] = column
        elif name in config.columns:
            raise InputError(f"columns.{name}: the prompts have no column {column!r}; they have {_named(schema)}")
    if "prompt" not in columns:
        raise InputError(
            f"the prompts have no column 'prompt'; they have {_named(schema)}: name the right one with --columns.prompt"
        )
    for file, file_schema in zip(files, schemas, strict=True):
        if file.rows and columns["prompt"] not in file_schema.names:
            raise InputError(
                f"prompts file {file.name!r} has no column {columns['prompt']!r}; it has {_named(file_schema)}"
            )
    kind = schema.field(columns["prompt"]).type
    if not (is_text(kind) or pa.types.is_null(kind)):
        raise InputError(
            f"prompts: column {columns['prompt']!r} is of type {one_line(kind, 100)}; a prompt must be a string"
            f"{'; `gaudi-batch prompts IN OUT.parquet` makes strings of it' if is_binary(kind) else ''}"
        )
    return columns


def _find_files(config: JobConfig) -> tuple[Storage, list[str]]:
    """The prompts' storage and the names of their files in it."""
    url = config.prompts
    options = config.prompts_storage_options
    if options is None:
        options = config.options_for(url)
    whole = Storage(url, options, config.storage_patience, read_only=True)
    filesystem, path = whole.filesystem, whole.root
    # Only names of http files stay URLs. Their query often is a signature: a secret, and no part of a name.
    plain, mark, query = path.partition("?") if "://" in path else (path, "", "")
    query = mark + query
    output = _real(str(filesystem._strip_protocol(config.output)), whole)

    of_other_runs: set[str] = set()

    @functools.cache
    def holds_run(place: str) -> bool:
        try:
            return b'"fingerprint"' in filesystem.cat_file(f"{place}/run.json")
        except FileNotFoundError:
            return False

    def is_of_any_run(name: str) -> bool:
        real = _real(name, whole)
        if f"{real}/".startswith(f"{output}/") and is_of_run(real[len(output) + 1 :]):
            return True
        place, _, last = name.rpartition("/")
        above, _, below = place.rpartition("/")
        if last in OWN_FILES:
            holds = holds_run(place)
        elif below == "manifest":
            holds = parse_manifest(last) is not None and holds_run(above)
        elif below in (DATA, IMAGES):
            holds = (parse_attempt(last) is not None or last == METADATA) and holds_run(above)
        else:
            holds = below in (ROLLUPS, JOINED) and bool(own_names(below, [last])) and holds_run(above)
        if holds and last.endswith(".parquet"):
            of_other_runs.add(name)
        return holds

    def prompts(names: Iterable[str], files: Any) -> list[str]:
        """The names, without links in a circle and without files that runs have written."""
        loops = files.loops if isinstance(files, LinkedFileSystem) else ()
        return [name for name in names if not (name in loops or is_of_any_run(name))]

    # Without it, aiohttp would wait for minutes for a silent server, and http would then report no such file.
    limit = {"timeout": whole.try_timeout_s} if filesystem.async_impl else {}

    def list_prompts() -> _Found:
        if _GLOB.search(plain) and not filesystem.exists(path):
            base = _GLOB.split(path)[0].rpartition("/")[0]
            files = LinkedFileSystem(base) if whole.local else filesystem
            entries = files.glob(path, detail=True)
            matches = prompts(entries, files)
            taken = [name for name in matches if entries[name]["type"] != "directory"]
            above = {str(parent) for name in taken for parent in PurePosixPath(name).parents}
            return _Found(base, files, taken, set(matches) - above.union(taken), "a glob takes files and no directory")
        try:
            info = filesystem.info(path, **limit)
        except FileNotFoundError:  # http reports the same for a host that it can't find
            if why := out_of_reach(url):
                raise ConnectionError(why) from None
            raise
        if info["type"] == "file":
            return _Found(plain.rpartition("/")[0], filesystem, [plain])
        files = LinkedFileSystem(path) if whole.local else filesystem
        names = prompts(files.find(path), files)
        below = {name: name[len(path) :] for name in names}
        meant = [
            name
            for name, relative in below.items()
            if _PARQUET_SUFFIX.search(relative) or (_PARQUET.search(relative) and not is_hidden(relative))
        ]
        taken = [name for name in meant if name.endswith(".parquet") and not is_hidden(below[name])]
        others = {name for name, relative in below.items() if not is_hidden(relative)} - set(meant)
        return _Found(path, files, taken, set(meant) - set(taken), DIRECTORY_RULE, others)

    try:
        with told_if_slow(lambda: f"prompts {whole.url}: still looking for them{whole.last_error}"):
            files_found = whole.with_retries("find the prompts", list_prompts, MANY_TIMEOUT_S)
    except StorageError as error:
        if not error.refused and (why := out_of_reach(url)):
            raise StorageError(
                f"prompts {whole.url!r} can't be found, tried for {config.storage_patience:g} s: {why}"
            ) from None
        if "FileNotFoundError" in str(error):
            raise InputError(f"prompts {whole.url!r}: there is no such file or directory") from None
        raise
    _say_what_is_passed_over(whole, files_found, of_other_runs)
    if not files_found.taken:
        names = [name[len(files_found.base) :].lstrip("/") for name in files_found.others]
        way_out = how_to_convert(whole.url, names, config.columns, bool(whole.options))
        besides = f", and {_some(files_found.others, files_found.base)} is" if files_found.others else ""
        raise InputError(
            f"prompts {whole.url!r}: no Parquet file (*.parquet) is there{besides}"
            + (f"; {way_out}" if way_out else "")
        )
    return whole.at(files_found.base, query), [name[len(files_found.base) :].lstrip("/") for name in files_found.taken]


@dataclass(frozen=True)
class _Found:
    """The result of a search for prompts."""

    base: str
    """The directory at which names of files begin."""
    filesystem: Any
    taken: list[str]
    left: Collection[str] = ()
    """Files that were probably meant as prompts and are not taken."""
    rule: str = ""
    """Why they are not taken."""
    others: Collection[str] = ()
    """Files whose names are not those of Parquet."""


def _real(name: str, storage: Storage) -> str:
    """A name with its links resolved, without a slash at its end."""
    return os.path.realpath(name) if storage.local else name.rstrip("/")


def _say_what_is_passed_over(storage: Storage, located: _Found, of_other_runs: Collection[str]) -> None:
    """Logs what is not taken, so that no rows are missing in silence, and what is taken twice.

    Raises:
        InputError: a file is a link that leads nowhere.
    """
    counts = {
        "left out, as " + located.rule: located.left,
        "left out, as a run that lies there has written it": of_other_runs,
    }
    if isinstance(located.filesystem, LinkedFileSystem):
        broken = located.filesystem.broken
        if missing := broken.intersection(located.taken):
            raise InputError(
                f"prompts {storage.url!r}: {_some(missing, located.base)} leads nowhere; mend or remove the link"
            )
        counts["left out, as it is a link that leads nowhere"] = {
            name for name in broken if not is_hidden(name[len(located.base) :])
        }
        counts["not followed, as it is a link to a directory that it is in"] = located.filesystem.loops
        real = {name: _real(name, storage) for name in located.taken}
        times = Counter(real.values())
        counts["taken under each of these names, which are links to the same; its rows are made more than once"] = {
            name for name in located.taken if times[real[name]] > 1
        }
    for what, passed_over in counts.items():
        if passed_over:
            log.warning("prompts %s: %s: %s", storage.url, _some(passed_over, located.base), what)


def _some(names: Collection[str], base: str, visible: int = 3) -> str:
    first = ", ".join(repr(name[len(base) :].lstrip("/")) for name in sorted(names)[:visible])
    return first + (f" and {len(names) - visible} more" if len(names) > visible else "")


def _footer(storage: Storage, name: str, columns: Mapping[str, str]) -> tuple[pq.FileMetaData, pa.Schema, bytes, str]:
    info = storage.info(name)  # some stores tell more here than in a listing, and other marks of a version
    size = int(info["size"] or 0)
    if size == 0 and info.get("size") is not None:
        raise InputError(f"prompts file {name!r} is empty (0 bytes); write it again, or take it out of the prompts")
    try:
        footer = read_footer(storage, name, size)
        opened = parse_footer(footer)
        metadata, schema = opened.metadata, opened.schema_arrow
        str(schema)  # raises for a name that is not UTF-8
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
            raise pa.ArrowInvalid("its numbers of rows disagree")
    except (pa.ArrowException, OSError, ValueError) as error:
        way_out = how_to_convert(storage.url, [name], columns, bool(storage.options))
        raise InputError(
            f"prompts file {name!r} is not a readable Parquet file: {way_out or one_line(error, 300)}"
        ) from None
    return metadata, schema, footer, identity_of(info, footer)


def _named(schema: pa.Schema) -> str:
    return ", ".join(repr(name) for name in schema.names)[:400]
