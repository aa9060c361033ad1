"""The installed command: runs a command and turns every outcome into an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import NoReturn

from gaudi_batch.cli.commands import COMMANDS, INTERRUPTED
from gaudi_batch.cli.parser import asks_for_json, parse
from gaudi_batch.errors import GaudiBatchError, InputError, RunStopped
from gaudi_batch.redaction import redact
from gaudi_batch.reporting.console import LossyStream, OutputLost, open_streams
from gaudi_batch.reporting.json_log import FIELDS, JsonFormatter, figures, logs_json
from gaudi_batch.text import OneLineFormatter, one_line, printable

log = logging.getLogger("gaudi_batch")
"""The logger of the whole package, which is set up here."""

OPTION_FLAG = re.compile(r"--(((prompts-)?storage|target)-options|on-end)\b")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, whatever happens."""
    if threading.current_thread() is threading.main_thread():
        # SIGTERM means the same as Ctrl-C from the first moment, not only while images are made; also in the background
        # of a shell, which ignores Ctrl-C there.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = sys.argv[1:] if arguments is None else list(arguments)
    _set_up_log(asks_for_json(given))
    parsed: argparse.Namespace | None = None
    try:
        try:
            parsed = parse(given)
        except InputError as error:
            if logs_json(log):
                log.error("%s", one_line(error, 2000))
            else:
                _complain(f"gaudi-batch: {one_line(error, 2000)}")
            return error.exit_code
        except SystemExit:
            return 0  # help or the version is printed
        if parsed.verbose:
            log.setLevel(logging.DEBUG)
        if arguments is None:
            _hide_secrets()
        return COMMANDS[parsed.command](parsed)
    except OutputLost as error:
        if error.closed:  # by a reader that has what it wants
            return 0
        log.error("%s", error)
        return error.exit_code
    except GaudiBatchError as error:
        summary = error.summary if isinstance(error, RunStopped) else None
        log.error("%s", error, extra={FIELDS: figures(summary or {})})
        return error.exit_code
    except KeyboardInterrupt:
        # Other commands make nothing that could be resumed.
        resumes = parsed is not None and parsed.command in ("run", "demo", "export")
        log.error("interrupted; the same command resumes" if resumes else "interrupted")
        return INTERRUPTED
    except BaseException:  # a library may call sys.exit
        if logs_json(log):
            log.critical("an error that nobody has foreseen", exc_info=True)
            return 1
        _complain("\n".join(map(printable, redact(traceback.format_exc()).splitlines())))
        return 1


def entry() -> NoReturn:
    """What the installed command calls; ends the process."""
    code = INTERRUPTED  # also if a second interrupt comes while the first is reported
    try:
        open_streams()
        code = main()
    finally:
        # Skips the interpreter's own end: threads that wait for storage would keep the process, and a library's thread
        # that asks for the interpreter meanwhile would abort it. Everything printed has been flushed.
        os._exit(code)


def _complain(text: str) -> None:
    print(text, file=LossyStream(sys.stderr), flush=True)


def _hide_secrets() -> None:
    """Removes storage options, on_end and the secrets in URLs from the title of this process, which `ps` shows to
    everybody and Ray records."""
    visible: list[str] = []
    for argument in sys.orig_argv:
        flag, equals, _ = argument.partition("=")
        if visible and OPTION_FLAG.match(visible[-1]) and "=" not in visible[-1]:
            visible.append("***")
        elif OPTION_FLAG.match(flag) and equals:
            visible.append(f"{flag}=***")
        else:
            visible.append(redact(argument))
    if visible != sys.orig_argv:
        from setproctitle import setproctitle

        setproctitle(shlex.join(visible))


def _set_up_log(as_json: bool) -> None:
    handler = logging.StreamHandler(LossyStream(sys.stderr))
    handler.setFormatter(JsonFormatter() if as_json else OneLineFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
