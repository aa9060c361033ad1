"""The commands: each takes the parsed arguments and returns an exit code.

Nothing heavy is imported before the command that needs it is known.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from gaudi_batch.cli.parser import RUN_SWITCHES
from gaudi_batch.errors import InputError
from gaudi_batch.redaction import redact
from gaudi_batch.reporting.console import OutputLost, require_reader, say
from gaudi_batch.reporting.json_log import FIELDS, JsonFormatter, figures, logs_json

if TYPE_CHECKING:
    from gaudi_batch.cluster.jobs_client import JobsClient
    from gaudi_batch.output.reader import OutputReader

log = logging.getLogger(__name__)

INTERRUPTED = 130
NOT_FOLLOWED = 141
"""The exit code of a command that SIGPIPE ends."""
STATUS_RETRY_TIMEOUT_S = 10.0
"""Seconds for which `status` tries an output that fails again."""


def run(parsed: argparse.Namespace) -> int:
    """Makes the images of a job."""
    from gaudi_batch.cli.flags import job_from
    from gaudi_batch.driver.runner import run as make_images

    switches = {name: getattr(parsed, name) for name in RUN_SWITCHES}
    result = make_images(job_from(parsed), address=parsed.address, grace=parsed.grace, **switches)
    _print_result(result.output, result.summary)
    return result.exit_code


def submit(parsed: argparse.Namespace) -> int:
    """Sends a job to a cluster, and follows it."""
    from gaudi_batch.cli.flags import job_from
    from gaudi_batch.cluster.jobs_client import JobsClient
    from gaudi_batch.cluster.submission import Submission, require_portable

    config = job_from(parsed)
    require_portable(config)
    flags = [f"--{name.replace('_', '-')}" for name in RUN_SWITCHES if getattr(parsed, name)]
    if parsed.log_format == "json":
        flags.append("--log-format=json")
    submission = Submission(config, flags, parsed.grace, parsed.job_id, parsed.ship_code)
    cluster = JobsClient(parsed.address)
    job = cluster.submit(submission)
    return _follow_job(cluster, job, f"job: {job}\n", parsed.wait)


def follow(parsed: argparse.Namespace) -> int:
    """Prints the log of a submitted job."""
    from gaudi_batch.cluster.jobs_client import JobsClient

    return _follow_job(JobsClient(parsed.address), parsed.job)


def _follow_job(cluster: JobsClient, job: str, first: str = "", wait: bool = True) -> int:
    this = f"{job} --address {redact(cluster.address)}"
    goes_on = f"job {job} goes on; `gaudi-batch follow {this}` shows it again, `stop` in its place ends it"
    try:
        say(first, end="")
        return cluster.follow(job, lambda piece: say(piece, end=""), require_reader) if wait else 0
    except KeyboardInterrupt:
        log.warning("%s", goes_on)
        return INTERRUPTED
    except OutputLost as error:
        log.warning("%s; %s", error, goes_on)
        return NOT_FOLLOWED


def stop(parsed: argparse.Namespace) -> int:
    """Stops a submitted job."""
    from gaudi_batch.cli.stopping import stop_job
    from gaudi_batch.cluster.jobs_client import JobsClient

    say(f"job {parsed.job}: {stop_job(JobsClient(parsed.address), parsed.job, parsed.grace)}")
    return 0


def check(parsed: argparse.Namespace) -> int:
    """Prints what a job would do."""
    from gaudi_batch.cli.check import check as check_job
    from gaudi_batch.cli.flags import job_from

    checked = check_job(job_from(parsed), parsed.strict, parsed.job)
    say(checked.text)
    if checked.refused is not None:
        raise InputError(checked.refused)
    return 0


def doctor(parsed: argparse.Namespace) -> int:
    """Looks for what would keep a job from running."""
    from gaudi_batch.cli.asking import has_cards, question
    from gaudi_batch.cluster.address import address_of
    from gaudi_batch.doctor.cluster import examine_cluster, examine_here
    from gaudi_batch.doctor.line import note
    from gaudi_batch.doctor.report import could_run, describe, table

    if parsed.address is not None and not parsed.address.strip():
        raise InputError("--address: is empty; name a cluster's head, as in head:6379, or leave it out for this node")
    asked = question(parsed)
    address = address_of(parsed.address) if parsed.address else None
    nodes = examine_cluster(asked, address) if address not in (None, "local") else examine_here(asked)
    if address is None and asked.device == "cpu" and not has_cards():
        for lines in nodes.values():
            advice = "gaudi-batch doctor --device hpu says what is missing for Gaudi cards"
            lines.append(note("cards", "not looked for: there is neither hl-smi nor habana_frameworks", advice))
    say(json.dumps(describe(nodes), indent=1) if parsed.json else table(nodes))
    return 0 if could_run(nodes) else 1


def bench(parsed: argparse.Namespace) -> int:
    """Measures how fast the cards are."""
    from gaudi_batch.bench.bench import bench as measure
    from gaudi_batch.cli.measuring import job_to_measure, require_positive
    from gaudi_batch.cluster.address import address_of

    if parsed.mlperf:
        return _bench_whole_job(parsed)
    require_positive("--calls", parsed.calls)
    address = address_of(parsed.address)
    measured = measure(job_to_measure(parsed, address), address, parsed.calls)
    say(json.dumps(measured.describe(), indent=1) if parsed.json else measured.table())
    return 0


def _bench_whole_job(parsed: argparse.Namespace) -> int:
    """Runs a job to its end and prints how many samples a second that were."""
    from gaudi_batch.bench.mlperf import Measured, describe, report
    from gaudi_batch.cli.flags import job_from
    from gaudi_batch.driver.runner import run as make_images
    from gaudi_batch.job import resolve
    from gaudi_batch.output.reader import OutputReader
    from gaudi_batch.storage.store import Storage

    config = job_from(parsed)
    reader = OutputReader(Storage(config.output, config.storage_options))
    if reader.run() is not None:
        raise InputError(f"output {reader.storage.url!r} holds a run; a measure needs an output of its own")
    if config.device == "auto":
        config = config.model_copy(update={"device": "hpu"})  # as the benchmark has it
    job = resolve(config)
    result = make_images(config, address=parsed.address)
    record = reader.run()
    measured = Measured.of(result.summary, (record.stacks or [{}])[-1] if record else {})
    say(json.dumps(describe(job, measured), indent=1) if parsed.json else report(job, measured))
    return result.exit_code


def tune(parsed: argparse.Namespace) -> int:
    """Finds the batch size for a model."""
    from gaudi_batch.cli.measuring import tune as find_batch_size

    find_batch_size(parsed)
    return 0


def status(parsed: argparse.Namespace) -> int:
    """Shows the progress of a run."""
    from gaudi_batch.output.place import refuse_file
    from gaudi_batch.output.reader import OutputReader
    from gaudi_batch.reporting.status import describe_status, read_status
    from gaudi_batch.storage.store import Storage
    from gaudi_batch.text import read_yaml

    options = read_yaml(parsed.storage_options, dict, "--storage-options") if parsed.storage_options else {}
    storage = Storage(parsed.output, options, STATUS_RETRY_TIMEOUT_S)
    refuse_file(storage)
    if parsed.watch:
        return _watch(OutputReader(storage), parsed)
    if parsed.interval is not None:
        raise InputError("--interval: says how often --watch looks, and there is no --watch")
    current = read_status(OutputReader(storage))
    say(json.dumps(current, indent=1) if parsed.json else describe_status(current))
    return 0


def _watch(reader: OutputReader, parsed: argparse.Namespace) -> int:
    """Shows the run in an output until it is over."""
    from gaudi_batch.reporting.screen import open_screen
    from gaudi_batch.reporting.status import describe_status
    from gaudi_batch.reporting.watch import EXIT_CODES, Watcher, watch

    with open_screen(parsed.json) as (show, interval_s):
        last = watch(Watcher(reader), show, parsed.interval or interval_s)
    say(json.dumps(last) if parsed.json else describe_status(last))
    return EXIT_CODES.get(last["state"], 1)


def report(parsed: argparse.Namespace) -> int:
    """Writes a page about a run."""
    from gaudi_batch.cli.report import write_report

    say(write_report(parsed))
    return 0


def export(parsed: argparse.Namespace) -> int:
    """Writes a run's images elsewhere."""
    from gaudi_batch.cli.exporting import export_run

    say(export_run(parsed))
    return 0


def prompts(parsed: argparse.Namespace) -> int:
    """Makes a Parquet file of prompts."""
    from gaudi_batch.cli.converting import convert_prompts

    result = convert_prompts(parsed)
    say("\n".join(result.lines()))
    return 3 if result.bad else 0


def demo(parsed: argparse.Namespace) -> int:
    """Runs a small job of bundled prompts."""
    from gaudi_batch.cli.demo import demo as run_demo

    result = run_demo(parsed.output, parsed.prompts_count)
    _print_result(result.output, result.summary)
    return result.exit_code


def emulate(parsed: argparse.Namespace) -> NoReturn:
    """Runs a command as on a machine with Gaudi cards."""
    from gaudi_batch.emulator import Machine
    from gaudi_batch.emulator import emulate as run_emulated

    run_emulated(
        parsed.argv[1:] if parsed.argv[:1] == ["--"] else parsed.argv,
        Machine(
            parsed.modules,
            parsed.capture_seconds,
            parsed.memory_gib,
            parsed.fault and tuple(parsed.fault),
            parsed.driver,
            parsed.state,
        ),
    )


def _print_result(output: str, summary: dict[str, Any]) -> None:
    """Prints the outcome of a run. The exit code is the same if nobody reads it."""
    from gaudi_batch.output.totals import result_lines

    lines = result_lines(output, summary)
    try:
        say(_as_json(lines[0], summary) if logs_json(logging.getLogger("gaudi_batch")) else "\n".join(lines))
    except OutputLost as error:
        if not error.closed:
            log.warning("%s", error)


def _as_json(message: str, summary: dict[str, Any]) -> str:
    """The outcome of a run as a log line: the log of a submitted job has both streams of its driver."""
    attributes = {"name": "gaudi_batch", "levelname": "INFO", "msg": message, FIELDS: figures(summary)}
    return JsonFormatter().format(logging.makeLogRecord(attributes))


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "run": run,
    "submit": submit,
    "follow": follow,
    "stop": stop,
    "check": check,
    "doctor": doctor,
    "bench": bench,
    "tune": tune,
    "status": status,
    "report": report,
    "export": export,
    "prompts": prompts,
    "demo": demo,
    "emulate": emulate,
}
"""By the name that the parser has of each."""
