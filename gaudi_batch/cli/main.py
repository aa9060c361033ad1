"""The command line: thin. Nothing heavy is imported before the command that needs it is known."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from gaudi_batch.errors import GaudiBatchError, InputError
from gaudi_batch.redaction import redact
from gaudi_batch.reporting.console import LossyStream, OutputLost, open_streams, say
from gaudi_batch.text import OneLineFormatter, nearest, one_line, printable

if TYPE_CHECKING:
    from gaudi_batch.cluster.jobs_client import Cluster

log = logging.getLogger("gaudi_batch")

INTERRUPTED = 130
NOT_FOLLOWED = 141
"""As of a command that SIGPIPE ends."""
STATUS_PATIENCE_SECONDS = 10.0
JOB_COMMANDS = ("run", "submit", "check", "bench")
"""The commands that take a job."""
COMMANDS = (*JOB_COMMANDS, "follow", "stop", "status", "demo", "emulate")
RUN_SWITCHES = {
    "strict": "read every row first and refuse the job if one can't be run",
    "overwrite": "remove the run that is in the output and start afresh",
    "retry_failed": "run the rows that have failed again, but for those whose own data is against the rules",
    "verify": "read every image back and compare it with its manifest",
    "repair": "make images again that are missing or torn",
}
OPTION_FLAG = re.compile(r"--(prompts-)?storage-options\b")
ADDRESS_HELP = "the cluster's dashboard; default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, whatever happens."""
    if threading.current_thread() is threading.main_thread():
        # SIGTERM means the same as Ctrl-C from the first moment on, not only while images are made; and that also in
        # the background of a shell, which has Ctrl-C ignored.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    _set_up_log()
    parsed: argparse.Namespace | None = None
    try:
        try:
            parsed = _parse(sys.argv[1:] if arguments is None else list(arguments))
        except InputError as error:
            _complain(f"gaudi-batch: {one_line(error, 2000)}")
            return error.exit_code
        except SystemExit:
            say("", end="")  # what argparse has printed of itself, and not yet written
            return 0
        if parsed.verbose:
            log.setLevel(logging.DEBUG)
        if arguments is None:
            _hide_secrets()
        return int(parsed.command(parsed))
    except OutputLost as error:
        if error.closed:  # by a reader that has what it wanted
            return 0
        log.error("%s", error)
        return error.exit_code
    except GaudiBatchError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        # What else there is makes nothing that could be resumed.
        resumes = parsed is not None and parsed.command in (_run, _demo)
        log.error("interrupted; the same command resumes" if resumes else "interrupted")
        return INTERRUPTED
    except BaseException:  # a library may leave by sys.exit
        _complain("\n".join(map(printable, redact(traceback.format_exc()).splitlines())))
        return 1


def entry() -> NoReturn:
    """What the installed command calls; ends the process."""
    code = INTERRUPTED  # also of an interrupt while another is told
    try:
        open_streams()
        code = main()
    finally:
        # Past the interpreter's own end: threads that wait for storage would keep the process, and one of a library
        # that asks for the interpreter while it ends would abort it. All that was printed has been flushed.
        os._exit(code)


def _complain(text: str) -> None:
    print(text, file=LossyStream(sys.stderr), flush=True)


# -- commands ---------------------------------------------------------------------------------------------------


def _run(parsed: argparse.Namespace) -> int:
    from gaudi_batch.cli.flags import job_from
    from gaudi_batch.driver.runner import run

    switches = {name: getattr(parsed, name) for name in RUN_SWITCHES}
    result = run(job_from(parsed), address=parsed.address, grace=parsed.grace, **switches)
    _print_result(result.output, result.summary)
    return result.exit_code


def _submit(parsed: argparse.Namespace) -> int:
    from gaudi_batch.cli.flags import job_from
    from gaudi_batch.cluster.jobs_client import Cluster, Submission, refuse_what_stays_here

    config = job_from(parsed)
    refuse_what_stays_here(config)
    flags = [f"--{name.replace('_', '-')}" for name in RUN_SWITCHES if getattr(parsed, name)]
    submission = Submission(config, flags, parsed.grace, parsed.job_id, parsed.ship_code)
    cluster = Cluster(parsed.address)
    job = cluster.submit(submission)
    return _follow_job(cluster, job, f"job: {job}\n", parsed.wait)


def _follow(parsed: argparse.Namespace) -> int:
    from gaudi_batch.cluster.jobs_client import Cluster

    return _follow_job(Cluster(parsed.address), parsed.job)


def _follow_job(cluster: Cluster, job: str, first: str = "", wait: bool = True) -> int:
    this = f"{job} --address {redact(cluster.address)}"
    goes_on = f"job {job} goes on; `gaudi-batch follow {this}` shows it again, `stop` in its place ends it"
    try:
        say(first, end="")
        return cluster.follow(job) if wait else 0
    except KeyboardInterrupt:
        log.warning("%s", goes_on)
        return INTERRUPTED
    except OutputLost as error:
        log.warning("%s; %s", error, goes_on)
        return NOT_FOLLOWED


def _stop(parsed: argparse.Namespace) -> int:
    from gaudi_batch.cluster.jobs_client import Cluster

    say(f"job {parsed.job}: {Cluster(parsed.address).stop(parsed.job, parsed.grace)}")
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from gaudi_batch.cli.check import check
    from gaudi_batch.cli.flags import job_from

    found = check(job_from(parsed), parsed.strict)
    say(found.text)
    if found.refused is not None:
        raise InputError(found.refused)
    return 0


def _bench(parsed: argparse.Namespace) -> int:
    from gaudi_batch.bench import bench
    from gaudi_batch.cli.demo import PROMPTS
    from gaudi_batch.cli.flags import job_from
    from gaudi_batch.cluster.address import address_of
    from gaudi_batch.cluster.devices import with_device
    from gaudi_batch.job import resolve

    if parsed.calls < 1:
        raise InputError(f"--calls is {parsed.calls}; it must be 1 or more")
    address = address_of(parsed.address)
    config = job_from(parsed, {"prompts": str(PROMPTS), "output": os.curdir})
    measured = bench(resolve(with_device(config, address)), address, parsed.calls)
    say(json.dumps(measured.describe(), indent=1) if parsed.json else measured.table())
    return 0


def _status(parsed: argparse.Namespace) -> int:
    from gaudi_batch.output.place import refuse_file
    from gaudi_batch.output.reader import OutputReader
    from gaudi_batch.reporting.status import describe_status, read_status
    from gaudi_batch.storage.store import Storage
    from gaudi_batch.text import read_yaml

    options = read_yaml(parsed.storage_options, dict, "--storage-options") if parsed.storage_options else {}
    storage = Storage(parsed.output, options, STATUS_PATIENCE_SECONDS)
    refuse_file(storage)
    status = read_status(OutputReader(storage))
    say(json.dumps(status, indent=1) if parsed.json else describe_status(status))
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    from gaudi_batch.cli.demo import demo

    result = demo(parsed.output, parsed.prompts_count)
    _print_result(result.output, result.summary)
    return result.exit_code


def _emulate(parsed: argparse.Namespace) -> NoReturn:
    from gaudi_batch.emulator import Machine, emulate

    emulate(
        parsed.argv[1:] if parsed.argv[:1] == ["--"] else parsed.argv,
        Machine(
            parsed.modules,
            parsed.capture_seconds,
            parsed.memory_gib,
            parsed.fault and tuple(parsed.fault),
            parsed.state,
        ),
    )


def _hide_secrets() -> None:
    """Takes storage options and what is secret in URLs out of this process's title, which `ps` shows to everybody and
    Ray keeps."""
    shown: list[str] = []
    for argument in sys.orig_argv:
        flag, equals, _ = argument.partition("=")
        if shown and OPTION_FLAG.match(shown[-1]) and "=" not in shown[-1]:
            shown.append("***")
        elif OPTION_FLAG.match(flag) and equals:
            shown.append(f"{flag}=***")
        else:
            shown.append(redact(argument))
    if shown != sys.orig_argv:
        from setproctitle import setproctitle

        setproctitle(shlex.join(shown))


def _print_result(output: str, summary: dict[str, Any]) -> None:
    """Prints how a run came out. That nobody takes it changes nothing of the run."""
    from gaudi_batch.output.tally import result_lines

    try:
        say("\n".join(result_lines(output, summary)))
    except OutputLost as error:
        if not error.closed:
            log.warning("%s", error)


# -- the parser -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def parse_args(self, arguments: Any = None, namespace: Any = None) -> Any:
        """See `argparse`; what follows a flag that there is not may be a secret, and is not repeated."""
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
            said = f"unrecognized arguments: {' '.join(flags or unknown)}"
            self.error(said + (_meant(flags[0], parsed.options) if flags else ""))
        return parsed

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice: '"):
            given = message.split("'")[1]
            if near := nearest(given, COMMANDS):
                message = f"there is no command {given!r}; did you mean {near}?"
        raise InputError(f"{message} ({self.prog} --help tells what there is)")


def _meant(flag: str, options: Collection[str]) -> str:
    """What somebody may have meant by a flag that there is not, "" if nothing comes near."""
    dashes = flag.replace("_", "-")
    below = [option for option in options if option.startswith(f"{dashes}.")]
    if below:
        return f"; {flag} has fields of its own: {', '.join(below)}"
    mapping, dot, _ = dashes.partition(".")
    if dot and f"{mapping}.NAME" in options:
        return f"; did you mean {mapping}.{flag.partition('.')[2]}?"
    near = nearest(dashes, options)
    return f"; did you mean {near}?" if near else ""


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command not in (*JOB_COMMANDS, "status"):
        return _parser(lambda command: None).parse_args(arguments)
    from gaudi_batch.cli.flags import add_job_flags, join_mapping_flags

    return _parser(add_job_flags).parse_args(join_mapping_flags(arguments))


def _parser(add_job_flags: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gaudi-batch",
        description="Turn a Parquet dataset of prompts into images in object storage on every Gaudi card of a cluster.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _command(commands, "run", _run, "make every image of a job that its output does not have yet")
    run.add_argument("--address", help="Ray cluster to use; default: RAY_ADDRESS, else Ray is started on this machine")
    _add_run_flags(run)
    add_job_flags(run)

    submit = _command(commands, "submit", _submit, "send a job to a cluster through the Ray Jobs API and follow it")
    submit.add_argument("--address", help=ADDRESS_HELP)
    submit.add_argument("--no-wait", dest="wait", action="store_false", help="do not follow the job")
    submit.add_argument("--job-id", help="what to call it; default: chosen at random")
    submit.add_argument(
        "--ship-code", action="store_true", help="have the nodes use this gaudi_batch and not the one installed there"
    )
    _add_run_flags(submit)
    add_job_flags(submit)

    follow = _command(commands, "follow", _follow, "print the log of a submitted job and end with its exit code")
    follow.add_argument("job", help="its id, as submit printed it")
    follow.add_argument("--address", help=ADDRESS_HELP)

    stop = _command(
        commands, "stop", _stop, "stop a submitted job; what it has begun is committed first, within its grace"
    )
    stop.add_argument("job", help="its id, as submit printed it")
    stop.add_argument("--address", help=ADDRESS_HELP)

    stop.add_argument(
        "--grace",
        type=_seconds,
        help="seconds in which what has begun is committed; default: the grace that the job was submitted with",
    )

    check = _command(
        commands, "check", _check, "read a job's rows, look at its output, and print its plan; starts nothing"
    )
    check.add_argument("--strict", action="store_true", help="refuse the job if a single row can't be run")
    add_job_flags(check)

    bench = _command(commands, "bench", _bench, "measure how fast the cards at hand are with a job's model")
    bench.add_argument("--address", help="as for run")
    bench.add_argument("--calls", type=int, default=10, help="timed calls for each figure (default: 10)")
    bench.add_argument("--json", action="store_true", help="as JSON")
    add_job_flags(bench)

    status = _command(commands, "status", _status, "say how far the run in an output is, from the output alone")
    status.add_argument("output", help="the job's output")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.add_argument("--storage-options", metavar="YAML", help="fsspec options of the output's storage")

    demo = _command(commands, "demo", _demo, "run a small job of bundled prompts on two cards of this machine")
    demo.add_argument("--output", default="demo-output", help="where the images go (default: demo-output)")
    demo.add_argument("--prompts-count", type=int, default=200, help="how many prompts (default: 200)")

    emulate = _command(commands, "emulate", _emulate, "run a command as on a machine with Gaudi cards, on the CPU")
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
    emulate.add_argument("--state", metavar="DIR", help="directory of the module locks and of counters/<pid>.json")
    emulate.add_argument("argv", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("gaudi-batch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # a cluster runs the code that a job brings along


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


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=function, options=command._option_string_actions)
    command.add_argument("--verbose", action="store_true", help="log more")
    return command


def _set_up_log() -> None:
    handler = logging.StreamHandler(LossyStream(sys.stderr))
    handler.setFormatter(OneLineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
