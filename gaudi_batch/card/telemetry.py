"""Watts and joules of a card, by a process beside it (`hlml.py`): nothing here waits for that process but the record of
a shard, and that briefly. Whatever it does or leaves undone costs no image."""

from __future__ import annotations

import collections
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from gaudi_batch.card.readings import Judge, Readings, Sample, over_time

log = logging.getLogger(__name__)

LIBRARY_VARIABLE = "GAUDI_BATCH_LIBHLML"
"""The environment variable that names libhlml.so, where it is not at `LIBRARY`."""
LIBRARY = "/usr/lib/habanalabs/libhlml.so"
"""Where Intel's packages put it, and where pyhlml looks for it."""
ANSWER_TIMEOUT_S = 1.0
"""Seconds after a call of the pipeline within which its counters must be read: later they say nothing of that call."""
FIND_TIMEOUT_S = 60.0
"""Seconds for which a device is looked for."""
MAX_SAMPLES = 4096
"""Looks of one call that are kept: an hour's."""
MAX_AGE_S = 10.0
"""Seconds for which a sample says what a card is doing now; a library that is silent for longer hangs."""


@dataclass
class Mark:
    """The end of one call of the pipeline, at which the counters are read."""

    number: int
    began: float
    """When the call began, monotonic."""
    ended: float
    answered: threading.Event = field(default_factory=threading.Event)
    result: Readings = field(default_factory=Readings)

    def readings(self) -> Readings:
        """What the counters say of the call. Waits, until `ANSWER_TIMEOUT_S` after its end at most."""
        self.answered.wait(max(0.0, self.ended + ANSWER_TIMEOUT_S - time.monotonic()))
        return self.result if self.answered.is_set() else Readings()


class Telemetry:
    """The counters of one card, while its process reads them. `mark` is one thread's, `latest` anyone's.

    Args:
        module: the module that Ray pinned; None where the device has none, and thus no counters.
    """

    def __init__(self, module: int | None) -> None:
        self._missing = ""
        self._lock = threading.Lock()
        self._pending: collections.deque[Mark] = collections.deque()
        self._marks = 0
        self._warned_of_hang = False
        self._latest: Sample | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._module = module
        if module is None:
            return
        library = os.environ.get(LIBRARY_VARIABLE, LIBRARY)
        if importlib.util.find_spec("pyhlml") is None:
            self._missing = "install habana-pyhlml, of the driver's release"
        elif not Path(library).exists():
            self._missing = f"there is no {library}; {LIBRARY_VARIABLE} names another place"
        else:
            self._start(module, library)
        if self._missing:
            log.debug("no watts and joules: %s", self._missing)

    def mark(self, began: float, ended: float) -> Mark:
        """Has the counters read for a call of the pipeline that has just ended. Never waits.

        Args:
            began: when the call began, monotonic.
            ended: when it ended.
        """
        mark = Mark(self._marks, began, ended)
        self._marks += 1
        with self._lock:
            try:
                if self._process is None or self._process.stdin is None:
                    raise BrokenPipeError
                os.write(self._process.stdin.fileno(), b"%d\n" % mark.number)
                self._pending.append(mark)
                if len(self._pending) > MAX_SAMPLES:  # the library hangs, and the process takes marks all the same
                    self._pending.popleft().answered.set()
            except OSError:  # it has ended, or its pipe is full since it stands still
                mark.answered.set()
            hangs = bool(self._pending) and ended - self._pending[0].ended > MAX_AGE_S
        if hangs and not self._warned_of_hang:
            self._warned_of_hang = True
            log.warning("module %s: no watts and joules while libhlml does not answer", self._module)
        return mark

    def latest(self) -> Readings:
        """What the card is doing now, without joules."""
        sample = self._latest
        return Readings() if sample is None or time.monotonic() - sample.at > MAX_AGE_S else sample.now

    def note(self, device: str) -> str:
        """What a node of Gaudi cards lacks for this, with the way out; empty if it lacks nothing.

        Args:
            device: what the pipeline says of it. A device that is no card, or an emulated one, has no counters.
        """
        is_card = device.startswith("hpu") and "(emulated)" not in device
        return f"no watts and joules: {self._missing}" if self._missing and is_card else ""

    def _start(self, module: int, library: str) -> None:
        command = [sys.executable, "-m", "gaudi_batch.card.hlml", str(module), library, str(FIND_TIMEOUT_S)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Ray puts code on the path of this process alone.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C in a terminal is not meant for it
            )
        except OSError as error:
            log.warning("module %d: no watts and joules: %s", module, error)
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        threading.Thread(target=self._read, args=(self._process, module), name="telemetry", daemon=True).start()

    def _read(self, process: subprocess.Popen[bytes], module: int) -> None:
        """Takes the answers as they come, which is in the order of the marks."""
        assert process.stdout is not None
        judge = Judge(module)
        before: tuple[int, Sample] | None = None
        samples: collections.deque[Sample] = collections.deque(maxlen=MAX_SAMPLES)
        error = ""
        try:
            for line in process.stdout:
                answer = json.loads(line)
                error = answer.get("error", "")
                if error:
                    break
                self._latest = sample = judge.judge(answer)
                samples.append(sample)
                number = answer["mark"]
                mark = self._take(number)
                if mark is None:
                    continue
                if sample.at > mark.ended + ANSWER_TIMEOUT_S:
                    before = None
                else:
                    in_order = before is not None and before[0] == number - 1
                    joules = judge.joules(before[1], sample) if before is not None and in_order else None
                    within = [each for each in samples if mark.began <= each.at < mark.ended]
                    mark.result = over_time(joules, within or [sample])
                    before = (number, sample)
                mark.answered.set()
                samples.clear()
        except (ValueError, KeyError, TypeError, AttributeError) as wrong:
            error = f"it answers in no known way: {wrong}"
        process.kill()
        ended = process.wait()
        log.warning("module %d: no watts and joules from now on: %s", module, error or f"libhlml ended with {ended}")
        with self._lock:
            self._process = None
            for mark in self._pending:
                mark.answered.set()
            self._pending.clear()

    def _take(self, number: int | None) -> Mark | None:
        """The mark of an answer: each that was sent is answered, in order."""
        if number is None:
            return None
        with self._lock:
            return self._pending.popleft() if self._pending and self._pending[0].number == number else None
