"""The command line: thin. Flags of a job are made from the fields of `JobConfig`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gaudi_batch.config import JobConfig, merge
from gaudi_batch.errors import GaudiBatchError, InputError
from gaudi_batch.text import printable

log = logging.getLogger("gaudi_batch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    try:
        parsed = _parser().parse_args(_join_mapping_flags(sys.argv[1:] if arguments is None else list(arguments)))
    except InputError as error:
        print(f"gaudi-batch: {error}", file=sys.stderr)
        return error.exit_code
    _set_up_log(parsed.verbose)
    try:
        return int(parsed.command(parsed))
    except GaudiBatchError as error:
        log.error("%s", printable(str(error)))
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted; the same command resumes")
        return 130
    except BrokenPipeError:
        return 0


def entry() -> None:
    """What the installed command calls."""
    sys.exit(main())


# -- commands ---------------------------------------------------------------------------------------------------


def _run(parsed: argparse.Namespace) -> int:
    from gaudi_batch.run import run

    result = run(
        _job(parsed), address=parsed.address, strict=parsed.strict, overwrite=parsed.overwrite, grace=parsed.grace
    )
    _print_result(result.output, result.summary)
    return result.exit_code


def _check(parsed: argparse.Namespace) -> int:
    from gaudi_batch.check import check
    from gaudi_batch.job import refuse_bad_rows, resolve

    job = resolve(_job(parsed))
    if parsed.strict:
        refuse_bad_rows(job)
    print(check(job))
    return 0


def _status(parsed: argparse.Namespace) -> int:
    from gaudi_batch.ledger import Ledger
    from gaudi_batch.status import describe_status, read_status
    from gaudi_batch.storage import Storage

    status = read_status(Ledger(Storage(parsed.output, _mapping(parsed.storage_options), patience=10.0)))
    print(json.dumps(status, indent=1) if parsed.json else printable(describe_status(status)))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from gaudi_batch.demo import demo

    result = demo(parsed.output, parsed.prompts_count)
    _print_result(result.output, result.summary)
    return result.exit_code


def _print_result(output: str, summary: dict[str, Any]) -> None:
    rate = f", {summary['images_per_s']:.2f} images/s of generation" if summary["images_per_s"] else ""
    print(
        f"{summary['state']}: {summary['images']} images, {summary['failed_rows']} failed rows,"
        f" {len(summary['cards'])} cards{rate}"
    )
    for name, card in summary["cards"].items():
        speed = "-" if card["images_per_s"] is None else f"{card['images_per_s']:.2f}"
        busy = "-" if card["busy_share"] is None else f"{card['busy_share']:.1%}"
        print(
            f"  card {name}: {card['images']} images, {speed} images/s, busy {busy}, warm-up {card['warmup_s']:.1f} s"
        )
    print(f"images:   {output}/images")
    print(f"manifest: {output}/manifest.parquet")
    print(f"summary:  {output}/summary.json")


# -- the parser -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise InputError(f"{message} ({self.prog} --help tells what there is)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gaudi-batch",
        description="Turn a Parquet dataset of prompts into images in object storage on every Gaudi card of a cluster.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("gaudi-batch"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "make every image of a job that its output does not have yet")
    run.add_argument("--address", help="Ray cluster to use; default: RAY_ADDRESS, else Ray is started on this machine")
    run.add_argument(
        "--strict", action="store_true", help="read every row first and refuse the job if one can't be run"
    )
    run.add_argument("--overwrite", action="store_true", help="remove the run that is in the output and start afresh")
    run.add_argument(
        "--grace",
        type=float,
        default=30.0,
        help="seconds in which what has begun is committed after SIGTERM or Ctrl-C (default: 30)",
    )
    _job_flags(run)

    check = _command(commands, "check", _check, "validate a job and print its plan, starting nothing")
    check.add_argument("--strict", action="store_true", help="read every row and refuse the job if one can't be run")
    _job_flags(check)

    status = _command(commands, "status", _status, "say how far the run in an output is, from the output alone")
    status.add_argument("output", help="the job's output")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.add_argument("--storage-options", metavar="YAML", help="fsspec options of the output's storage")

    demo = _command(commands, "demo", _demo, "run a small job of bundled prompts on two cards of this machine")
    demo.add_argument("--output", default="demo-output", help="where the images go (default: demo-output)")
    demo.add_argument("--prompts-count", type=int, default=200, help="how many prompts (default: 200)")
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=function)
    command.add_argument("--verbose", action="store_true", help="log more")
    return command


def _job_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", nargs="?", help="YAML file of the job; flags win over it")
    group = command.add_argument_group("fields of the job")
    for path, field in _fields(JobConfig):
        default = field.get_default(call_default_factory=True)
        shown = "" if field.is_required() or default in (None, {}, ()) else f" (default: {default})"
        group.add_argument(
            f"--{path.replace('_', '-')}",
            dest=f"field:{path}",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"{field.description}{shown}".replace("%", "%%"),
        )


def _fields(model: type[BaseModel], prefix: str = "") -> list[tuple[str, FieldInfo]]:
    """Every field of a job under its dotted name."""
    found: list[tuple[str, FieldInfo]] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _fields(field.annotation, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", field))
    return found


def _job(parsed: argparse.Namespace) -> JobConfig:
    overrides: dict[str, Any] = {}
    fields = dict(_fields(JobConfig))
    for flag, text in vars(parsed).items():
        if flag.startswith("field:"):
            path = flag.removeprefix("field:")
            value = _flag_value(path, text, fields[path])
            for part in reversed(path.split(".")):
                value = {part: value}
            overrides = merge(overrides, value)
    return JobConfig.load(parsed.job, overrides)


def _flag_value(path: str, text: str, field: FieldInfo) -> Any:
    """A flag's text as the config takes it: null is null, mappings and lists are YAML, the rest is as it is."""
    kinds = _kinds(field.annotation)
    if type(None) in kinds and text in ("null", "none", ""):
        return None
    if dict in kinds or tuple in kinds:
        return _mapping(text, f"--{path.replace('_', '-')}")
    return text


def _kinds(annotation: Any) -> set[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    return {typing.get_origin(annotation) or annotation}


def _mapping(text: str | None, flag: str = "--storage-options") -> Any:
    try:
        return yaml.safe_load(text) if text else {}
    except yaml.YAMLError:
        raise InputError(f"{flag}: its value must be YAML, such as '{{key: value}}'") from None


def _join_mapping_flags(arguments: list[str]) -> list[str]:
    """Turns `--storage-options.anon true`, a flag for one entry, into `--storage-options '{"anon": true}'`."""
    mappings = {
        f"--{path.replace('_', '-')}": path for path, field in _fields(JobConfig) if dict in _kinds(field.annotation)
    }
    joined: dict[str, dict[str, Any]] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, value = argument.partition("=")
        name, dot, key = flag.partition(".")
        if name in mappings and dot:
            if not equals:
                if not waiting:
                    raise InputError(f"{flag} needs a value")
                value = waiting.pop(0)
            loaded = _mapping(value, flag)
            # Names of columns and secrets are text, whatever YAML would make of them.
            entry: Any = loaded if isinstance(loaded, (bool, dict, list)) else value
            for part in reversed(key.split(".")):
                entry = {part: entry}
            joined[name] = merge(joined.get(name, {}), entry)
        else:
            rest.append(argument)
    for name, value in joined.items():
        rest += [name, json.dumps(value)]
    return rest


def _set_up_log(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    log.propagate = False
