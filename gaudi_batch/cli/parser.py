"""The command line for argparse."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from gaudi_batch.errors import InputError
from gaudi_batch.reporting.console import say
from gaudi_batch.text import nearest

JOB_COMMANDS = ("run", "submit", "check", "doctor", "bench", "tune")
"""The commands that take a job."""
COMMANDS = (*JOB_COMMANDS, "follow", "stop", "status", "report", "export", "prompts", "demo", "emulate")
RUN_SWITCHES = {
    "strict": "read every row first and refuse the job if one can't be run",
    "overwrite": "remove the run that is in the output and start afresh",
    "retry_failed": "run the rows that have failed again, but for those whose own data is against the rules",
    "verify": "read every image back and compare it with its manifest",
    "repair": "make images again that are missing or torn",
}
ADDRESS_HELP = "the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265"


class _Parser(argparse.ArgumentParser):
    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """See `argparse`; what follows an unknown flag may be a secret and is not repeated."""
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
            message = f"unrecognized arguments: {' '.join(flags or unknown)}"
            self.error(message + (_meant(flags[0], parsed.options) if flags else ""))
        return parsed

    def _print_message(self, message: str, file: Any = None) -> None:
        say(message, end="")  # help and the version, in whose place `error` prints nothing

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice: '"):
            given = message.split("'")[1]
            if near := nearest(given, COMMANDS):
                message = f"there is no command {given!r}; did you mean {near}?"
        raise InputError(f"{message} ({self.prog} --help tells what there is)")


def _meant(flag: str, options: Collection[str]) -> str:
    """The flag that was probably meant in place of an unknown one; "" if none is similar."""
    dashes = flag.replace("_", "-")
    below = [option for option in options if option.startswith(f"{dashes}.")]
    if below:
        return f"; {flag} has fields of its own: {', '.join(below)}"
    mapping, dot, _ = dashes.partition(".")
    if dot and f"{mapping}.NAME" in options:
        return f"; did you mean {mapping}.{flag.partition('.')[2]}?"
    near = nearest(dashes, options)
    return f"; did you mean {near}?" if near else ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the arguments; `command` is the name of the command, `options` its flags. Raises InputError."""
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command not in (*JOB_COMMANDS, "status", "report", "export", "prompts"):
        return _parser(lambda command: None).parse_args(arguments)
    from gaudi_batch.cli.flags import add_job_flags, join_mapping_flags

    return _parser(add_job_flags).parse_args(join_mapping_flags(arguments))


def asks_for_json(arguments: Sequence[str]) -> bool:
    """Whether the arguments ask for a log in JSON; known before they are parsed, so that what is wrong with them is
    said so, too."""
    given = [value for flag, value in pairwise(arguments) if flag == "--log-format"]
    return "--log-format=json" in arguments or "json" in given


def _parser(add_job_flags: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gaudi-batch",
        description="Turn a Parquet dataset of prompts into images in object storage on every Gaudi card of a cluster.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", "make every image of a job that its output does not have yet")
    run.add_argument("--address", help="Ray cluster to use; default: RAY_ADDRESS, else Ray is started on this machine")
    _add_run_flags(run)
    add_job_flags(run)

    submit = _command(commands, "submit", "send a job to a cluster through the Ray Jobs API and follow it")
    submit.add_argument("--address", help=ADDRESS_HELP)
    submit.add_argument("--no-wait", dest="wait", action="store_false", help="do not follow the job")
    submit.add_argument("--job-id", help="what to call it; default: chosen at random")
    submit.add_argument(
        "--ship-code", action="store_true", help="have the nodes use this gaudi_batch and not the one installed there"
    )
    _add_run_flags(submit)
    add_job_flags(submit)

    follow = _command(commands, "follow", "print the log of a submitted job and end with its exit code")
    follow.add_argument("job", help="its id, as submit printed it")
    follow.add_argument("--address", help=ADDRESS_HELP)

    stop = _command(commands, "stop", "stop a submitted job; what it has begun is committed first, within its grace")
    stop.add_argument("job", help="its id, as submit printed it")
    stop.add_argument("--address", help=ADDRESS_HELP)

    stop.add_argument(
        "--grace",
        type=_seconds,
        help="seconds in which what has begun is committed; default: the grace that the job was submitted with",
    )

    check = _command(commands, "check", "read a job's rows, look at its output, and print its plan; starts nothing")
    check.add_argument("--strict", action="store_true", help="refuse the job if a single row can't be run")
    add_job_flags(check)

    doctor = _command(commands, "doctor", "look for what would keep this node, or a cluster, from running a job")
    doctor.add_argument("--address", help="Ray cluster, all of whose nodes are asked; default: this node alone")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    add_job_flags(doctor)

    bench = _command(commands, "bench", "measure how fast the cards at hand are with a job's model")
    bench.add_argument("--address", help="as for run")
    bench.add_argument(
        "--mlperf",
        action="store_true",
        help="run the job itself, as MLPerf's text-to-image benchmark does offline, and print samples a second",
    )
    bench.add_argument("--calls", type=int, default=10, help="timed calls for each figure (default: 10)")
    bench.add_argument("--json", action="store_true", help="as JSON")
    add_job_flags(bench)

    tune = _command(commands, "tune", "find the batch size for a model on a card, and write it into the job file")
    tune.usage = "gaudi-batch tune [options] [MODEL] [JOB]"
    tune.add_argument(
        "model", nargs="?", help="hub id, directory or builtin:shapes; default: the model of the job file"
    )
    tune.add_argument("--address", help="as for run")
    tune.add_argument("--calls", type=int, default=5, help="timed calls for each batch size (default: 5)")
    tune.add_argument("--max-batch-size", type=int, default=256, help="the largest batch size to try (default: 256)")
    tune.add_argument("--json", action="store_true", help="as JSON")
    add_job_flags(tune)

    status = _command(commands, "status", "say how far the run in an output is, from the output alone")
    status.add_argument("output", help="the job's output")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.add_argument("--watch", action="store_true", help="show it again and again until the run is over")
    status.add_argument(
        "--interval",
        type=_interval,
        help="seconds between two looks of --watch, 1 or more (default: 5; in lines without a terminal, 30)",
    )
    status.add_argument("--storage-options", metavar="YAML", help="fsspec options of the output's storage")

    report = _command(commands, "report", "make a page of HTML about the run in an output, also while it goes on")
    report.add_argument("output", help="the job's output")
    report.add_argument("--to", metavar="FILE", default="report.html", help="the page to write (default: report.html)")
    report.add_argument("--storage-options", metavar="YAML", help="fsspec options of the output's storage")

    export = _command(commands, "export", "write a run's images elsewhere, packed, named and described for others")
    export.add_argument("output", help="of the run's job")
    export.add_argument("target", metavar="DEST", help="directory or URL that is empty, or holds a try of this export")
    export.add_argument(
        "--format", choices=["parquet", "webdataset", "files"], default="parquet", help="default: parquet"
    )
    export.add_argument("--target-size", default="500MB", help="of an object, about (default: 500MB)")
    export.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="only rows that have it (also !=, <, <=, >, >=), as nsfw!=true; = and != take several with commas between"
        " them, and a value with a comma in double quotes; again for more filters; default: status=ok",
    )
    export.add_argument("--split", metavar="SHARES|COLUMN", help="shares by a hash of the id, as test=5%%, or a column")
    export.add_argument("--name", help="template of names, as {id}-{image_index} (default: row and image)")
    export.add_argument("--complete", action="store_true", help="refuse a run that is not complete")
    export.add_argument("--address", help="Ray cluster whose nodes write it; default: this process writes")
    export.add_argument("--push", metavar="OWNER/NAME", help="push it to this dataset repository of Hugging Face's hub")
    export.add_argument("--private", action="store_true", help="make that repository private, if it is not there")
    export.add_argument("--storage-options", metavar="YAML", help="fsspec options of the output's storage")
    export.add_argument("--target-options", metavar="YAML", help="those of DEST's; default: the same on one protocol")

    prompts = _command(commands, "prompts", "make a Parquet file of prompts from CSV, TSV, JSON, text or Parquet")
    prompts.add_argument("source", metavar="IN", help="path or URL of the file; .gz, .bz2 and .xz are decompressed")
    prompts.add_argument("target", metavar="OUT.parquet", help="path or URL of the file to make")
    prompts.add_argument("--columns", metavar="VALUE", help="as for run: names of IN's columns where they are others")
    prompts.add_argument(
        "--format", choices=["csv", "tsv", "jsonl", "json", "txt", "parquet"], help="default: as IN is named"
    )
    prompts.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    prompts.add_argument("--prompts-storage-options", metavar="YAML", help="fsspec options of the storage of IN")
    prompts.add_argument("--storage-options", metavar="YAML", help="fsspec options of the storage of OUT.parquet")

    demo = _command(commands, "demo", "run a small job of bundled prompts on two cards of this machine")
    demo.add_argument("--output", default="demo-output", help="where the images go (default: demo-output)")
    demo.add_argument("--prompts-count", type=int, default=200, help="how many prompts (default: 200)")

    emulate = _command(commands, "emulate", "run a command as on a machine with Gaudi cards, on the CPU")
    emulate.usage = "gaudi-batch emulate [options] -- COMMAND [ARGUMENTS]"
    emulate.add_argument("--modules", help="how many cards, or their ids as 4,5,6,7 (default: 8)")
    emulate.add_argument(
        "--capture-seconds", type=float, help="what each graph capture costs, as compilation does (default: 0)"
    )
    emulate.add_argument("--memory-gib", type=float, help="memory of one card (default: 96)")
    emulate.add_argument(
        "--fault",
        action="append",
        metavar="KIND[:MODULE][@LAUNCH][xTIMES]",
        help="inject acquire, oom or hang, from a process's launch number LAUNCH on, TIMES times (default: 1 and 1)",
    )
    emulate.add_argument("--driver", metavar="RELEASE", help="of the driver and the firmware (default: 1.24.0)")
    emulate.add_argument("--state", metavar="DIR", help="directory of the module locks and of counters/<pid>.json")
    emulate.add_argument("argv", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("gaudi-batch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # the cluster runs code that the job brings along


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    for name, text in RUN_SWITCHES.items():
        command.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    command.add_argument(
        "--grace",
        type=_seconds,
        default=30.0,
        help="seconds in which what has begun is committed after SIGTERM or Ctrl-C (default: 30)",
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds, 0 or more")


def _interval(text: str) -> float:
    seconds = _seconds(text)
    if seconds < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a second")
    return seconds


def _command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=name, options=command._option_string_actions)
    command.add_argument("--verbose", action="store_true", help="log more")
    command.add_argument(
        "--log-format",
        choices=["text", "json"],
        default="text",
        help="json: each log line is a JSON object, and nothing is drawn on a terminal (default: text)",
    )
    return command
