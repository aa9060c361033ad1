"""Tells whom a job names that its run is over: webhooks and commands.

It is told by each driver that found shards to make, once all that the run held is given back, whatever ended it. What
can't be told is a warning and nothing else: the exit code and the records are those of the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from types import TracebackType
from typing import Any, Protocol
from urllib.parse import urlsplit

from gaudi_batch.config.schema import JobConfig
from gaudi_batch.config.sections import VARIABLE, OnEndConfig, check_webhook
from gaudi_batch.driver.outcome import Outcome
from gaudi_batch.driver.run_context import Run
from gaudi_batch.errors import ForcedInterrupt, InputError, Interrupted
from gaudi_batch.redaction import learn, redact
from gaudi_batch.storage.retry import TRANSIENT_STATUSES
from gaudi_batch.text import describe_error, one_line

log = logging.getLogger(__name__)

TOTAL_TIMEOUT_S = 60.0
"""Seconds that all telling may take, all tries of it."""
INTERRUPTED_TIMEOUT_S = 10.0
"""The same after a signal: Ray kills a submitted job 15 s after its grace."""
FORCED_TIMEOUT_S = 3.0
"""The same after a second signal."""
POST_TIMEOUT_S = 10.0
"""Seconds of one try at a webhook. A command may take all of the time that is left."""
FIRST_DELAY_S = 1.0
"""Seconds before the second try; each later delay is twice as long."""
KILL_TIMEOUT_S = 1.0
"""Seconds in which a command that takes too long is killed."""
POLL_INTERVAL_S = 0.05
"""Seconds between two looks whether a command has ended."""
NO_COMMAND = (126, 127)
"""Exit codes of a shell for a command that it may not run, or that is not there."""
SLACK_HOST = "hooks.slack.com"


class Refused(Exception):
    """Another try would be refused, too."""


class Target(Protocol):
    """One of those who are told."""

    name: str
    """As log lines have it."""

    def tell(self, outcome: Outcome, until: float, given_up: threading.Event) -> None:
        """Tells it once.

        Args:
            outcome: what.
            until: when it must have ended, monotonic.
            given_up: set when nobody waits for it any more.

        Raises:
            Refused: it was refused for good.
            OSError: it failed.
        """


class Webhook:
    """A URL to which the outcome is posted. Redirects are not followed: they would turn the post into a get.

    Args:
        place: where the job names it, as `on_end[0]`.
        config: what the job says of it.

    Raises:
        InputError: a variable is not set, or what comes of it is no URL.
    """

    def __init__(self, place: str, config: OnEndConfig) -> None:
        def value(match: Any) -> str:
            if not os.environ.get(match[1]):
                raise InputError(f"{place}.url: the environment of this process has no variable {match[1]}; set it")
            return os.environ[match[1]]

        self._url = VARIABLE.sub(value, config.url or "")
        try:
            check_webhook(self._url)
        except ValueError as error:
            raise InputError(f"{place}.url: {error}") from None
        parts = urlsplit(self._url)
        learn({"on_end": self._url})
        self.name = place  # of some services the host is the secret
        self._is_slack = config.format == "slack" or (config.format is None and parts.hostname == SLACK_HOST)

    def tell(self, outcome: Outcome, until: float, given_up: threading.Event) -> None:
        """See `Target`."""
        body = outcome.slack() if self._is_slack else outcome.json()
        headers = {"Content-Type": "application/json", "User-Agent": f"gaudi-batch/{outcome.version}"}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        seconds = max(0.1, min(POST_TIMEOUT_S, until - time.monotonic()))
        try:
            urllib.request.build_opener(_NoRedirects).open(request, timeout=seconds).close()
        except urllib.error.HTTPError as error:
            answer = f"it answers {error.code}"  # its words may repeat the URL
            error.close()
            if error.code < 500 and error.code not in TRANSIENT_STATUSES:
                raise Refused(answer) from None
            raise OSError(answer) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):  # it names the host
                raise OSError("its certificate is not accepted") from None
            raise OSError(one_line(error.reason, 200)) from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: the redirect itself is the answer."""


class Command:
    """A shell command that gets the outcome as JSON on standard input.

    Args:
        place: where the job names it, as `on_end[0]`.
        config: what the job says of it.
    """

    def __init__(self, place: str, config: OnEndConfig) -> None:
        self.name = f"{place} (a command)"
        self._command = config.command or ""
        learn({"on_end": config.urls})

    def tell(self, outcome: Outcome, until: float, given_up: threading.Event) -> None:
        """See `Target`. A command that takes too long is killed with all that it has started."""
        about = {"GAUDI_BATCH_EXIT_CODE": str(outcome.exit_code), "GAUDI_BATCH_STATE": outcome.state}
        # Files and no pipes: what it leaves in the background would keep a pipe open.
        with tempfile.TemporaryFile() as given:
            given.write(outcome.json())
            given.seek(0)
            process = subprocess.Popen(
                self._command,
                shell=True,
                stdin=given,
                # What it says may be a webhook's URL, or without end.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | about,
                start_new_session=True,
            )
            while process.poll() is None:
                if given_up.wait(POLL_INTERVAL_S) or time.monotonic() > until:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    raise OSError("it took too long and was killed")
            if process.returncode in NO_COMMAND:
                raise Refused(f"it can't be run (exit code {process.returncode}); the command alone says why")
            if process.returncode:
                raise OSError(f"it ended with exit code {process.returncode}; what it printed is not kept")


class OnEnd:
    """Whom a job has told that its run is over. Used as a context around all of the run.

    Args:
        config: the job.

    Raises:
        InputError: a URL has a variable that is not set.
    """

    def __init__(self, config: JobConfig) -> None:
        self.run: Run | None = None
        """The run, once there is one."""
        self._targets: list[Target] = [
            (Command if each.url is None else Webhook)(f"on_end[{number}]", each)
            for number, each in enumerate(config.on_end)
        ]

    def __enter__(self) -> OnEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._targets or self.run is None or not self.run.begun:
            return
        seconds = TOTAL_TIMEOUT_S
        if isinstance(error, ForcedInterrupt):
            seconds = FORCED_TIMEOUT_S
        elif isinstance(error, (Interrupted, KeyboardInterrupt)):
            seconds = INTERRUPTED_TIMEOUT_S
        try:
            tell_all(self._targets, Outcome.of(self.run, error), seconds)
        except (Exception, KeyboardInterrupt) as failure:
            log.warning("on_end: %s", describe_error(failure))


def tell_all(targets: list[Target], outcome: Outcome, seconds: float) -> None:
    """Tells everybody at the same time, and returns after so many seconds at the latest, or when a signal comes."""
    until, given_up = time.monotonic() + seconds, threading.Event()
    threads = [
        threading.Thread(target=_tell, args=(target, outcome, until, given_up), name=target.name, daemon=True)
        for target in targets
    ]
    try:
        for thread in threads:
            thread.start()
        _join(threads, until - time.monotonic() + KILL_TIMEOUT_S)
        for thread in threads:
            if thread.is_alive():
                log.warning("%s is not told that the run is over: it has not answered for %g s", thread.name, seconds)
    except KeyboardInterrupt:
        log.warning("on_end: interrupted, so nobody is told any more")
        given_up.set()
        _join(threads, KILL_TIMEOUT_S)


def _join(threads: list[threading.Thread], seconds: float) -> None:
    until = time.monotonic() + seconds
    for thread in threads:
        if thread.ident is not None:
            thread.join(max(0.0, until - time.monotonic()))


def _tell(target: Target, outcome: Outcome, until: float, given_up: threading.Event) -> None:
    """Tells one, again and again until it is told or the time is over."""
    delay = FIRST_DELAY_S
    while True:
        try:
            target.tell(outcome, until, given_up)
        except Refused as refused:
            log.warning("%s is not told that the run is over: %s", target.name, redact(str(refused)))
            return
        except OSError as error:
            why = redact(one_line(error))
        except Exception as error:
            why = type(error).__name__  # its words may quote the URL
        else:
            log.info("%s is told that the run is over", target.name)
            return
        if time.monotonic() + delay > until:
            log.warning("%s is not told that the run is over, and is not tried again: %s", target.name, why)
            return
        log.info("%s is not told yet, and is tried again in %g s: %s", target.name, delay, why)
        if given_up.wait(delay):
            return
        delay *= 2
