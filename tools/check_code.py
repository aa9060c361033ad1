"""Refuses what the linter has no rule for: retired words among identifiers, functions of many arguments, long modules.

    python tools/check_code.py

An identifier is refused as a whole, and for some words also as a part between underscores. In tests and
benchmarks only the words are looked at.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "gaudi_batch"
WORDS_ALONE = (REPOSITORY / "tests", REPOSITORY / "benchmarks")
EXCLUDED = PACKAGE / "emulator/site"
"""Stands in for another package, and has its names."""
MAX_ARGUMENTS = 6
MAX_LINES = 360
MANY_ARGUMENTS = {"driver/runner.py run": "the public function, whose keywords are the flags of the command"}
RETIRED = {
    "QUEUE": "MAX_IN_FLIGHT",
    "hand": "in_flight",
    "news": "poll",
    "News": "CardReport",
    "heard": "last_seen",
    "Trouble": "ShardFailures",
    "accused": "failed_alone_once",
    "condemned": "fail_without_running",
    "condemn": "mark_unreadable",
    "vindications": "shards_made_elsewhere",
    "strikes": "consecutive_failures",
    "proven": "has_succeeded",
    "_prove": "record_success or confirm_failures",
    "control": "probe",
    "NEUTRAL": "PROBE",
    "hold": "ensure_held",
    "unsettled": "in_doubt",
    "hurry": "shut_down",
    "leavings": "uncommitted objects",
    "patience": "retry_timeout_s",
    "PASSING_STATUSES": "TRANSIENT_STATUSES",
    "_knock": "check_reachable",
    "in_time": "run_with_timeout",
    "where_am_i": "card_placement",
    "_look": "a verb that says for what",
    "useful": "demand",
    "usable": "live_cards",
    "expect": "ClusterSeen",
    "made_again": "latest_shard_of_row",
    "start_afresh": "clear",
    "AtOnce": "ForcedInterrupt",
    "refuse_what_stays_here": "require_portable",
    "Account": "RunProgress",
    "Tally": "CommitTotals",
    "Sums": "ThroughputTotals",
    "CommitFacts": "CommitInfo",
    "ModelFacts": "ModelInfo",
    "ImageFacts": "ImageInfo",
    "Findings": "VerifyReport",
    "RunRecord": "RunInfo",
    "GaudiConfig": "GaudiSettings",
    "shown": "short_repr",
    "said": "a noun that says what it holds",
    "its": "a noun that says what it holds",
    "theirs": "a noun that says what it holds",
    "there": "a noun that says what it holds",
    "mine": "a noun that says what it holds",
    "found": "a noun that says what it holds",
    "waiting": "a noun that says what it holds",
}
RETIRED_PARTS = {
    "accused": "failed_alone_once",
    "beating": "renewing",
    "blame": "note or suspect",
    "condemned": "fail_without_running",
    "facts": "info",
    "findings": "report",
    "heard": "last_seen",
    "hurry": "shut_down",
    "leavings": "uncommitted",
    "look": "a verb that says for what",
    "patience": "retry_timeout_s",
    "proven": "has_succeeded",
    "strikes": "consecutive_failures",
    "tally": "totals",
    "theirs": "a noun that says what it holds",
    "trouble": "failures or last_error",
    "unsettled": "in_doubt",
    "vindications": "shards_made_elsewhere",
}
"""Words that are refused as parts of a name, too."""
RETIRED_IN_CONSTANTS = {"SECONDS": "TIMEOUT_S, INTERVAL_S or another name in _S", "MOST": "MAX"}
STORED = {"storage_patience"}
"""Names that users have in their job files."""


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names that a module defines, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif (isinstance(node, ast.ExceptHandler) and node.name is not None) or (
            isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name is not None
        ):
            yield node.lineno, node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((node.lineno, alias.asname) for alias in node.names if alias.asname is not None)


def better_name(identifier: str) -> str | None:
    """What a retired name is to be replaced by; None if it is not retired."""
    if identifier in STORED:
        return None
    bare = identifier.strip("_")
    if identifier in RETIRED or bare in RETIRED:
        return RETIRED.get(identifier) or RETIRED[bare]
    parts = RETIRED_PARTS | (RETIRED_IN_CONSTANTS if identifier.isupper() else {})
    words = bare.split("_")
    return next((better for part, better in parts.items() if part in words or part.upper() in words), None)


def retired_words(path: Path, name: str) -> Iterator[str]:
    """The names in a module that are retired.

    Args:
        path: of the module.
        name: what to call it.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, identifier in sorted(set(identifiers(tree))):
        better = better_name(identifier)
        if better is not None:
            yield f"{name}:{line}: {identifier} is retired; use {better}"


def problems(path: Path, name: str) -> Iterator[str]:
    """What is wrong with a module of the package; see `retired_words`."""
    yield from retired_words(path, name)
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MAX_LINES:
        yield f"{name}: {lines} lines; a module has {MAX_LINES} at most: which two things is it?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if count > MAX_ARGUMENTS and f"{name} {node.name}" not in MANY_ARGUMENTS:
                yield f"{name}:{node.lineno}: {node.name} takes {count} arguments; {MAX_ARGUMENTS} at most"


def main() -> int:
    """Prints all problems; returns 1 if there are some."""
    listed = [
        problem
        for path in sorted(PACKAGE.rglob("*.py"))
        if EXCLUDED not in path.parents
        for problem in problems(path, path.relative_to(PACKAGE).as_posix())
    ]
    listed += [
        problem
        for folder in WORDS_ALONE
        for path in sorted(folder.rglob("*.py"))
        for problem in retired_words(path, path.relative_to(REPOSITORY).as_posix())
    ]
    print("\n".join(listed) or "the words, arguments and lengths are as they should be")
    return 1 if listed else 0


if __name__ == "__main__":
    sys.exit(main())
